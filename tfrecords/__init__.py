"""From a screen's tables and images to sharded TFRecords, and from these to batches.

`build_records` writes, `verify_records` checks, `read_records` reads. TensorFlow, pandas, NumPy and Pillow; no Keras.
"""

import importlib

_HOME = {
    "read_sites": "sources",
    "assign_splits": "splits",
    "plan_shards": "plan",
    "build_records": "build",
    "verify_records": "verify",
    "repair_records": "repair",
    "describe_records": "describe",
    "write_contact_sheet": "contact_sheet",
    "read_manifest": "manifest",
    "class_names": "manifest",
    "list_sites": "listing",
    "read_records": "read",
    "local_folder": "mirror",
    "random_batches": "composition",
    "batches_within": "composition",
    "batches_across": "composition",
    "batches_of_experiments": "composition",
    "batches_with_controls": "composition",
    "batches_from_shares": "shares",
    "channel_statistics": "normalize",
    "site_ids_of_step": "order",
    "read_published": "published",
    "augment": "preprocess",
    "standardize": "preprocess",
    "turn_and_crop": "augmentation",
    "random_resized_crop": "augmentation",
    "gain_and_bias": "augmentation",
    "cutmix": "augmentation",
    "mix_batches": "augmentation",
    "keep_tensorflow_off_gpu": "devices",
    "keep_freed_memory": "memory",
    "write_screen": "synthetic",
}

__all__ = sorted(_HOME)


def __getattr__(name):
    # Loaded at first use: importing stays light, and `python -m tfrecords.build` runs a module not yet imported.
    if name not in _HOME:
        raise AttributeError(f"module 'tfrecords' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tfrecords.{_HOME[name]}"), name)


def __dir__():
    return __all__
