"""The families, one file each, registered with timm on import."""

from . import mobilenetv2_acconv as mobilenetv2_acconv
from . import mobilenetv2_doconv as mobilenetv2_doconv
from . import mobilenetv2_dyconv as mobilenetv2_dyconv
from . import mobilenetv2_refconv as mobilenetv2_refconv
from . import resnet_acconv as resnet_acconv
from . import resnet_doconv as resnet_doconv
from . import resnet_dyconv as resnet_dyconv
from . import resnet_refconv as resnet_refconv
from ._registry import register_variant as register_variant
