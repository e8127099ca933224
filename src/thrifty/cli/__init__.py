"""The command line: parse, call, print. No logic of its own, and no other room imports it."""

import logging

__all__: list[str] = []

for _name in ("torchao", "torch.utils._pytree"):  # to whoever builds torchao, which transformers imports if it is there
    logging.getLogger(_name).setLevel(logging.ERROR)
