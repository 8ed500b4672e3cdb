"""What train.py is made of. ``import timm_reparam`` does not import it."""
