"""The parts of train.py. ``import timm_reparam`` does not import them."""
