"""Other tasks on the training loop of `common/train.py`."""
