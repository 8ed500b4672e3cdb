"""The stock architectures that the families hold."""

RESNETS = (
    'resnet10t',
    'resnet14t',
    'resnet18',
    'resnet18d',
    'resnet26',
    'resnet26d',
    'resnet26t',
    'resnet34',
    'resnet34d',
    'resnet50',
    'resnet50d',
    'resnet101',
    'resnet101d',
    'resnet152',
    'resnet152d',
    'resnext50_32x4d',
    'resnext101_32x8d',
    'seresnet50',
    'wide_resnet50_2',
    'wide_resnet101_2',
)

MOBILENETV2S = (
    'mobilenetv2_035',
    'mobilenetv2_050',
    'mobilenetv2_075',
    'mobilenetv2_100',
    'mobilenetv2_110d',
    'mobilenetv2_120d',
    'mobilenetv2_140',
)
