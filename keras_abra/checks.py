"""What `ABRAModel` is given: its arguments, inputs and labels."""

import keras

from keras_abra import backend
from keras_abra.kinds import is_integer, is_number
from keras_abra.layers import FeatureStatisticsUncertainty
from keras_abra.losses import ArcFace, CosFace, DistributionAlignment
from keras_abra.perturbed_norms import PERTURBED_NORMS

ONE_SAMPLE = (
    "keras_abra: A training batch of one sample has no spread and no batch statistics. Use a larger batch, "
    "and leave a last batch of one sample out (drop_remainder=True). [keras_abra]"
)
NO_SAMPLE = (
    "keras_abra: A training batch left a replica without a sample. Expected: at least one for each replica of the "
    "distribution strategy. Leave a small last batch out (drop_remainder=True). [keras_abra]"
)

_OF_PROBABILITIES = ("sparse_categorical_crossentropy", "categorical_crossentropy", "crossentropy", "ce")
_OF_PROBABILITIES += ("SparseCategoricalCrossentropy", "CategoricalCrossentropy")
_OF_PROBABILITIES += ("auc", "AUC")
_OF_PROBABILITIES += ("kl_divergence", "KLDivergence", "kld", "binary_crossentropy", "BinaryCrossentropy", "bce")
_KERAS_OWN = (
    keras.losses.sparse_categorical_crossentropy,
    keras.losses.categorical_crossentropy,
    keras.losses.binary_crossentropy,
    keras.losses.kl_divergence,
    keras.metrics.AUC,
    *(
        getattr(module, name)
        for module in (keras.metrics, keras.losses)
        for name in ("SparseCategoricalCrossentropy", "CategoricalCrossentropy", "BinaryCrossentropy", "KLDivergence")
    ),
)


def unpack_inputs(inputs, expected):
    """`(image, experiment or None)` from images or a dict.

    Args:
        inputs: images, or a dict with `"image"` and perhaps `"experiment"`.
        expected: the backbone's input, of which shape and type are looked at.

    Raises:
        ValueError: if these are no images, or their rank, size, channels or type do not fit the backbone.
    """
    image, experiment = inputs, None
    if isinstance(inputs, dict):
        if "image" not in inputs:
            raise ValueError(
                f"A dict of inputs needs the key 'image' (and may have 'experiment'). Received: {sorted(inputs)}"
            )
        image, experiment = inputs["image"], inputs.get("experiment")
    if not hasattr(image, "shape"):
        raise ValueError(
            f"Expected images, (batch, height, width, channels), or a dict with 'image'. Received: {type(image)}"
        )
    integers = "float" not in expected.dtype
    expected, shape = tuple(expected.shape), tuple(image.shape)
    fits = len(shape) == 4 and all(
        e is None or s is None or e == s for e, s in zip(expected[1:], shape[1:], strict=True)
    )
    if not fits:
        raise ValueError(
            f"Images must have the backbone's shape (batch, height, width, channels) = {expected}. Received: {shape}"
        )
    dtype = keras.backend.standardize_dtype(image.dtype)
    if "float" not in dtype and dtype != "uint8":
        raise ValueError(f"Images must be float (standardized) or uint8. Received: dtype {dtype}")
    if integers and "float" in dtype:
        raise ValueError(f"The backbone takes grey levels as integers, and would cut off fractions. Received: {dtype}")
    return image, experiment


def check_labels(y, num_classes):
    """Raises a ValueError unless there is a class number, or the share of each class, for every sample."""
    shape = None if y is None else tuple(y.shape)
    if shape is None or len(shape) not in (1, 2) or (len(shape) == 2 and shape[1] not in (1, num_classes)):
        raise ValueError(
            "Every sample needs one integer label, shape (batch,), or the share of each class, shape (batch, "
            f"{num_classes}). Received: {'no labels' if y is None else f'shape {shape}'}"
        )


def has_shares(y, num_classes):
    """Whether labels are shares of the classes, not class numbers."""
    shape = getattr(y, "shape", ())
    return len(shape) == 2 and num_classes > 1 and shape[1] == num_classes


def check_gradients_add_up(model):
    """Raises a ValueError where gradients of two passes, or of replicas, are to be summed and one is none: Keras hands
    over the new scales of float8 layers as such."""
    if not model.stages and backend.replicas() == 1:
        return
    found = next((v for v in model.trainable_variables if getattr(v, "overwrite_with_gradient", False)), None)
    if found is not None:
        raise ValueError(
            "float8 layers cannot be trained with perturbed stages or on several replicas: their new scales, which "
            f"Keras hands over as gradients, would be added up. Received: {found.path!r}. Train in mixed_bfloat16."
        )


def check_metrics(arguments, names):
    """Raises a ValueError if a metric of `compile` would be taken for one of our logs, or takes probabilities.

    Args:
        arguments: dict of those of `compile`.
        names: of our logs.
    """
    metrics = [arguments.get("metrics"), arguments.get("weighted_metrics")]
    for metric in keras.tree.flatten(metrics):
        name = metric if isinstance(metric, str) else getattr(metric, "name", getattr(metric, "__name__", None))
        of_probabilities = metric in _OF_PROBABILITIES if isinstance(metric, str) else _takes_probabilities(metric)
        if of_probabilities:
            raise ValueError(
                f"The metric {name!r} takes probabilities, and ABRAModel predicts logits. `evaluate` gives their "
                "cross-entropy as `loss`; or give keras.metrics.SparseCategoricalCrossentropy(from_logits=True), for "
                "shares of classes CategoricalCrossentropy(from_logits=True) or AUC(from_logits=True)."
            )
        if name in names:
            raise ValueError(f"A metric may not be called {name!r}, as a log of ABRAModel is. Give it another name.")


def _takes_probabilities(metric):
    kinds = (keras.metrics.KLDivergence, keras.losses.KLDivergence)
    return (
        any(metric is own for own in _KERAS_OWN)
        or isinstance(metric, kinds)
        or getattr(metric, "from_logits", getattr(metric, "_from_logits", None)) is False
    )


def check_mirrored(optimizer, steps_per_execution, run_eagerly):
    """Raises a ValueError for what Keras's own training fails at on several replicas of a `tf.distribute` strategy."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    accumulates = bool(getattr(inner, "gradient_accumulation_steps", None))
    if steps_per_execution > 1 and not run_eagerly:
        raise ValueError(
            "Keras cannot compile several steps an execution under a tf.distribute strategy ('You must feed a value "
            f"for placeholder tensor'). Received: steps_per_execution={steps_per_execution}. Leave it at 1."
        )
    if accumulates and not run_eagerly:
        raise ValueError(
            "Keras cannot compile gradient accumulation under a tf.distribute strategy ('`merge_call` called "
            "while defining a new graph'). Received: gradient_accumulation_steps="
            f"{inner.gradient_accumulation_steps}. Leave it out: every replica adds its own gradients already."
        )
    if accumulates and (inner.clipnorm or inner.global_clipnorm or inner.clipvalue):
        raise ValueError(
            "Under a tf.distribute strategy Keras clips accumulated gradients replica by replica, before it sums them. "
            "Leave out gradient_accumulation_steps, or clipnorm, global_clipnorm and clipvalue."
        )


def check_arguments(
    uncertainty, loss, alignment, embedding_dim, perturbed_weight, perturbed_norms, warmup, class_names, num_classes
):
    """Raises a ValueError that names the first argument of `ABRAModel` that is of the wrong kind or out of range."""
    kinds = (
        ("uncertainty", uncertainty, FeatureStatisticsUncertainty),
        ("loss", loss, ArcFace | CosFace),
        ("alignment", alignment, DistributionAlignment),
    )
    for name, value, kind in kinds:
        if not isinstance(value, kind):
            expected = " or ".join(k.__name__ for k in getattr(kind, "__args__", (kind,)))
            raise ValueError(f"`{name}` must be a keras_abra {expected}. Received: {value!r}")
    for name, value in (("loss", loss), ("alignment", alignment)):
        if value.reduction not in ("sum_over_batch_size", "mean"):
            raise ValueError(
                f"ABRAModel takes the mean over samples. Received: `{name}` with reduction={value.reduction!r}"
            )
    if uncertainty.radius is None:
        raise ValueError("`uncertainty` needs a radius: the search must know how far it may go. Received: radius=None")
    if embedding_dim is not None and not (is_integer(embedding_dim) and embedding_dim >= 1):
        raise ValueError(f"`embedding_dim` must be a positive integer or None. Received: {embedding_dim!r}")
    if not (is_number(perturbed_weight) and 0 <= perturbed_weight < float("inf")):
        raise ValueError(f"`perturbed_weight` must be a number of at least 0. Received: {perturbed_weight!r}")
    if perturbed_norms not in PERTURBED_NORMS:
        raise ValueError(f"`perturbed_norms` must be one of {PERTURBED_NORMS}. Received: {perturbed_norms!r}")
    whole = is_integer(warmup) and warmup >= 0
    if not (whole or (isinstance(warmup, float) and 0 <= warmup < 1)):
        raise ValueError(
            f"`warmup` must be a number of steps (int >= 0) or a share of all steps (float in [0, 1)). "
            f"Received: {warmup!r}"
        )
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(
            f"`class_names` must name each of the {num_classes} classes. Received: {len(class_names)} names"
        )
