"""The ladder on screens of four classes and 24 pixels."""

import ladder

SCREEN = {"batch_effect": 1.0, "image_size": 24, "treatments": 4, "train": 4, "val": 2, "test": 2}
RULE = {"warmup": 1, "patience": 1, "smooth": 1, "least": 1, "most": 2, "decay": 0.5}
# Fewer channels than 8, and oneDNN writes past its memory in strided 1 x 1 convolutions (uxlfoundation/oneDNN 6035).
TINY = {"batch_size": 8, "width": 8, "embedding_dim": 6}


def start(output, *arguments):
    return ladder.main([*arguments, "--workers", "1", "--output", str(output)])


def result_of(accuracies, diverged=False):
    """What `run_cell` gives, for the accuracy on each split."""
    splits = {
        split: {
            "accuracy": value,
            "well_accuracy": value,
            "cell_type": {},
            "experiment": {"HUVEC-01": {"accuracy": value, "count": 1}},
        }
        for split, value in accuracies.items()
    }
    done = {"epochs": 1, "steps": 1, "step_seconds": 1.0, "step_cost": 1.0, "at_most": False}
    return done | {"diverged": diverged, "splits": splits}
