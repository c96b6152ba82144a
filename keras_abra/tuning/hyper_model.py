import contextlib
import inspect
import json
from typing import Any, NamedTuple

import keras

from keras_abra.kinds import is_integer
from keras_abra.layers import FeatureStatisticsUncertainty
from keras_abra.losses import ArcFace, CosFace, DistributionAlignment
from keras_abra.models import ABRAModel

try:
    import keras_tuner
except ImportError as error:
    raise ImportError(
        'keras_abra.tuning needs KerasTuner, which is not installed: pip install "keras-abra[tune]"'
    ) from error


class _Space(NamedTuple):
    """What is searched by default, and the package's own default."""

    default: Any
    values: Any  # (low, high) or a list of choices
    log: bool = False
    needs: tuple = ()  # (name, choices that make it meaningful)


_ADVERSARY = ("stages", "any")
_ALIGNMENTS = ["none", "symmetric_kl", "jensen_shannon", "coral", "mmd"]
SPACES = {
    "margin": _Space(0.5, (0.0, 0.6)),
    "scale": _Space(30.0, (8.0, 64.0), log=True),
    "warmup": _Space(0.1, (0.0, 0.3)),
    "stages": _Space(None, None),
    "radius": _Space(0.15, (0.05, 1.0), log=True, needs=(_ADVERSARY,)),
    "steps": _Space(0, [0, 1, 3], needs=(_ADVERSARY,)),
    "step_size": _Space(0.5, (0.1, 2.0), log=True, needs=(_ADVERSARY, ("steps", "positive"))),
    "alignment": _Space("symmetric_kl", _ALIGNMENTS, needs=(_ADVERSARY,)),
    "alignment_weight": _Space(1.0, (0.1, 10.0), log=True, needs=(_ADVERSARY, ("alignment", "any"))),
    "learning_rate": _Space(1e-3, (1e-4, 1e-2), log=True),
    "weight_decay": _Space(1e-5, (1e-6, 1e-1), log=True),
}


class ABRAHyperModel(keras_tuner.HyperModel):
    """An `ABRAModel` whose margin, and what goes with it, KerasTuner searches.

    Give it to any tuner of KerasTuner, with accuracy on *unseen validation experiments* as the objective; the test
    experiments are for the end. `build` compiles the model itself: leave the tuner's `optimizer`, `loss` and `metrics`
    alone, or it compiles again without the schedule.

    Hyperparameters and their default spaces (and defaults: the package's own): `margin` 0 to 0.6 radians (0.5; with
    `CosFace` 0.35), `scale` 8 to 64 (30), `warmup` 0 to 0.3 of the steps (0.1), `stages` (the first that is given),
    `radius` 0.05 to 1 (0.15), `steps` 0, 1 or 3 (0), `step_size` 0.1 to 2 radii (0.5), `alignment` (symmetric_kl) and
    `alignment_weight` 0.1 to 10 (1), `learning_rate` 1e-4 to 1e-2 (1e-3), `weight_decay` 1e-6 to 0.1 (1e-5). Scale,
    radius, step size, weight, learning rate and decay are searched by their logarithm. What a choice makes meaningless
    is not searched: the adversary's where no stage is perturbed, the step size where K is 0, the weight where there is
    no alignment.

    Weights, noise and order of every execution are those of one seed: the first execution of a trial has `seed`, the
    next `seed + 1` and so on, so that a setting that was found can be trained again by itself.

    Args:
        backbone: function without arguments that builds the backbone, a Functional `keras.Model`.
        num_classes: integer of at least 2.
        stages: lists of layer names to perturb after; the choice among them is searched. `[]` is the margin loss alone.
        search: names of the hyperparameters to search, or a dict from name to space: `(low, high)`, a list of choices,
            or None for the default space (of stages, lists out of `stages`). Default: all of them.
        fixed: dict from name to value: hyperparameters that are not searched. What is in neither has the default.
        optimizer: function of `(learning_rate, weight_decay)` that makes the optimizer. Default
            `keras.optimizers.AdamW`.
        seed: integer of at least 0.
        uncertainty: dict of more arguments of `FeatureStatisticsUncertainty`, the same in every trial: `structure`
            (by default `low_rank` in trials with an adversary, else `diagonal`), `start`, `shared_by` and so on.
        loss: `ArcFace` (default) or `CosFace`, the class whose margin and scale are searched.
        alignment: dict of more arguments of `DistributionAlignment`, the same in every trial: `two_sided`,
            `synchronized`.
        compile_arguments: more arguments of `compile`. Default `{"metrics": ["accuracy"]}`.
        name: name of the hypermodel.
        **kwargs: more arguments of `ABRAModel`: `embedding_dim`, `perturbed_weight`, `class_names`.

    Raises:
        ValueError: for an unknown name, a name in both `search` and `fixed`, a space that is none, or an argument that
            `FeatureStatisticsUncertainty` or `DistributionAlignment` refuses.

    Example:

    >>> def backbone():
    ...     image = keras.Input((16, 16, 6))
    ...     x = keras.layers.Conv2D(8, 3, activation="relu", name="stem")(image)
    ...     return keras.Model(image, keras.layers.Conv2D(8, 3, activation="relu")(x))
    >>> hypermodel = ABRAHyperModel(backbone, 5, [["stem"]], search={"margin": (0.0, 0.3)}, embedding_dim=8)
    >>> tuner = keras_tuner.RandomSearch(hypermodel, "val_accuracy", max_trials=8)  # doctest: +SKIP
    >>> tuner.search(train, validation_data=val, epochs=20)  # doctest: +SKIP
    """

    def __init__(
        self,
        backbone,
        num_classes,
        stages,
        search=None,
        fixed=None,
        optimizer=None,
        seed=0,
        uncertainty=None,
        compile_arguments=None,
        name="abra",
        loss=ArcFace,
        alignment=None,
        **kwargs,
    ):
        super().__init__(name=name)
        search = dict.fromkeys(SPACES if search is None else search) if not isinstance(search, dict) else dict(search)
        fixed = dict(fixed or {})
        if unknown := sorted({*search, *fixed} - SPACES.keys()):
            raise ValueError(f"Unknown hyperparameters: {', '.join(unknown)}. Expected some of {', '.join(SPACES)}.")
        if both := sorted(search.keys() & fixed.keys()):
            raise ValueError(f"`search` and `fixed` both name {', '.join(both)}. A hyperparameter is one or the other.")
        if isinstance(fixed.get("stages"), list | tuple):
            fixed["stages"] = _joined(fixed["stages"])
        if isinstance(search.get("stages"), list):
            search["stages"] = [_joined(names) for names in search["stages"]]
        for key, space in search.items():
            _check_space(key, space)
        self.uncertainty = dict(uncertainty or {})
        if both := sorted(self.uncertainty.keys() & SPACES.keys()):
            raise ValueError(f"`uncertainty` names {', '.join(both)}: give that in `search` or in `fixed`.")
        if not (isinstance(loss, type) and issubclass(loss, ArcFace | CosFace)):
            raise ValueError(f"`loss` must be a class, ArcFace or CosFace: its margin is searched. Received: {loss!r}")
        self.search, self.fixed, self.loss = search, fixed, loss
        for steps in self._choices("steps"):
            try:
                FeatureStatisticsUncertainty(steps=steps, **self.uncertainty)
            except ValueError as error:
                hint = "" if "steps" in fixed else " (`steps` is searched or 0: give others in `search` or `fixed`)"
                raise ValueError(f"`uncertainty` is refused with steps={steps}{hint}: {error}") from error
        self.alignment = dict(alignment or {})
        if both := sorted(self.alignment.keys() & {"kind", "weight"}):
            raise ValueError(
                f"`alignment` names {', '.join(both)}: give `alignment`, `alignment_weight` in `search` or in `fixed`."
            )
        if made := sorted(kwargs.keys() & {"perturb_after", "warmup"}):
            raise ValueError(f"{', '.join(made)}: give `stages` and `warmup` in `search` or in `fixed`.")
        for kind in self._choices("alignment"):
            DistributionAlignment("symmetric_kl" if kind == "none" else kind, **self.alignment)
        if not stages or any(isinstance(names, str) for names in stages):
            raise ValueError(f"`stages` must be a list of lists of layer names. Received: {stages!r}")
        if not (is_integer(seed) and seed >= 0):
            raise ValueError(f"`seed` must be an integer of at least 0. Received: {seed!r}")
        self.backbone = backbone
        self.num_classes = num_classes
        self.stages = {_joined(names): list(names) for names in stages}
        asked = [fixed["stages"]] if "stages" in fixed else search.get("stages") or []
        if unknown := [names for names in asked if names not in self.stages]:
            raise ValueError(f"The stages {unknown[0]!r} are none of `stages`: {', '.join(self.stages)}.")
        self.optimizer = optimizer or (lambda rate, decay: keras.optimizers.AdamW(rate, weight_decay=decay))
        self.seed = seed
        self.compile_arguments = {"metrics": ["accuracy"]} if compile_arguments is None else compile_arguments
        self.model_arguments = kwargs
        self._fits = {}

    def settings(self, hp):
        """Declares the hyperparameters and gives their values: a dict, without those that are meaningless."""
        values = {}
        for name, space in SPACES.items():
            with contextlib.ExitStack() as scopes:
                parents = {parent: self._meaningful(parent, wanted) for parent, wanted in space.needs}
                meaningful = all(values.get(parent) in choices for parent, choices in parents.items())
                for parent, choices in parents.items():
                    if parent in self.search and choices:
                        scopes.enter_context(hp.conditional_scope(parent, choices))
                if not all(parents.values()):
                    continue  # no choice at all makes it meaningful
                if name in self.search:
                    value = self._declare(hp, name)
                else:
                    value = self.fixed.get(name, self._default(name))
                if meaningful:
                    values[name] = value
        return values

    def build(self, hp):
        """The compiled model of one setting."""
        values = self.settings(hp)
        keras.utils.set_random_seed(self.execution_seed(hp))
        model = self.make(values)
        model.compile(optimizer=self.make_optimizer(hp, values), **self.compile_arguments)
        return model

    def make_optimizer(self, hp, values):
        """The optimizer of a dict of settings; to be overridden where more than they decides."""
        return self.optimizer(values["learning_rate"], values["weight_decay"])

    def make(self, values):
        """The model of a dict of settings, as `settings` gives it; not compiled."""
        backbone = self.backbone()
        perturbed = {}
        if names := self.stages[values["stages"]]:
            uncertainty = {name: values[name] for name in ("radius", "steps", "step_size") if name in values}
            perturbed["uncertainty"] = FeatureStatisticsUncertainty(**uncertainty, **self.uncertainty)
            if values["alignment"] == "none":
                perturbed["alignment"] = DistributionAlignment(weight=0.0, **self.alignment)
            else:
                perturbed["alignment"] = DistributionAlignment(
                    values["alignment"], weight=values["alignment_weight"], **self.alignment
                )
        loss = self.loss(values["margin"], values["scale"])
        return ABRAModel(
            backbone, self.num_classes, names, loss=loss, warmup=values["warmup"], **perturbed, **self.model_arguments
        )

    def fit(self, hp, model, *args, **kwargs):
        self._fits[_key(hp)] = self._fits.get(_key(hp), 0) + 1
        return super().fit(hp, model, *args, **kwargs)

    def execution_seed(self, hp):
        """Seed of the next execution of a setting: `seed` plus the number of those that were fitted in this process."""
        return self.seed + self._fits.get(_key(hp), 0)

    def _default(self, name):
        if name == "stages":
            return next(iter(self.stages))
        own = inspect.signature(self.loss).parameters.get(name)  # CosFace's margin is another one than ArcFace's
        return SPACES[name].default if own is None or own.default is own.empty else own.default

    def _choices(self, name):
        if name in self.fixed or name not in self.search:
            return [self.fixed.get(name, self._default(name))]
        if name == "stages":
            return list(self.search[name] or self.stages)
        return list(self.search[name] or SPACES[name].values)

    def _meaningful(self, name, wanted):
        choices = self._choices(name)
        return [choice for choice in choices if choice != "none" and (wanted == "any" or choice > 0)]

    def _declare(self, hp, name):
        space, given, default = SPACES[name], self.search[name], self._default(name)
        values = self._choices(name) if name == "stages" else given or space.values
        if isinstance(values, list):
            default = values[0] if name == "stages" or default not in values else default
            return hp.Choice(name, values, default=default)
        low, high = values
        default = min(max(default, low), high)
        sampling = "log" if space.log and low > 0 else "linear"
        return hp.Float(name, low, high, sampling=sampling, default=default)


def _joined(names):
    """What stands for a list of layers where hyperparameters are texts."""
    return names if isinstance(names, str) else "+".join(names) or "none"


def _check_space(name, space):
    if space is None:
        return
    numeric = isinstance(SPACES[name].default, float)
    if numeric and isinstance(space, tuple) and len(space) == 2 and space[0] < space[1]:
        return
    if isinstance(space, list) and space:
        return
    raise ValueError(
        f"The space of {name!r} must be {'(low, high) with low < high, ' if numeric else ''}a list of "
        "choices, or None for the default. "
        f"Received: {space!r}"
    )


def _key(hp):
    return json.dumps(hp.values, sort_keys=True)
