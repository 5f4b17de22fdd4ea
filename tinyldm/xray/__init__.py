"""The x-ray of one drawing: everything that a pipeline computes between a prompt and a picture.

    record = tinyldm.xray(pipe, prompt)     arrays by name: see record.py
    tinyldm.attention_maps(pipe, prompt)    where on the picture each word is read: see attention.py
    python -m tinyldm.xray "a prompt"       the same as a page: see page.py
"""
import sys
import types


class _CallableModule(types.ModuleType):
    """`tinyldm.xray` is this package for `python -m`, and a function for everybody else: Python
    looks for __call__ in a module's class, not in the module."""

    def __call__(self, *arguments, **options):
        from .record import xray

        return xray(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
