"""Other tasks on the training loop of `common/training/train.py`."""
