import math
import warnings

import keras
from keras import ops

from keras_abra import backend, uncertainty
from keras_abra.feature_statistics import feature_statistics, shift_statistics
from keras_abra.kinds import is_integer, is_number, plain

STRUCTURES = ("diagonal", "low_rank", "domain")
STARTS = ("noise", "zero")
SEARCH_LOSSES = ("margin", "softmax")


class ReplicaSeedGenerator(keras.random.SeedGenerator):
    """A `SeedGenerator` whose seeds differ between the replicas of a distribution strategy."""

    def next(self, ordered=True):
        return backend.fold_in_replica(super().next(ordered))


def apart(seed, number, step=0x9E3779B1):
    """The seed of stream `number`, far from those of others: torch draws step t of a seed from seed + t."""
    return None if seed is None else (seed + number * step) % 2**31


@keras.saving.register_keras_serializable("keras_abra")
class FeatureStatisticsUncertainty(keras.layers.Layer):
    """Perturbs the channel statistics of a feature map within their uncertainty, in training.

    What differs between experiments of a screen, once content is set aside, is to a good part the mean and standard
    deviation of feature channels. The layer treats both as uncertain and moves them. Inside an `ABRAModel` it says
    where the worst case is searched; by itself, in any model, it draws at random.

    With `mu`, `sigma` the statistics of a sample, `d = (d_mu, d_sigma)` linear in coordinates `eps`, and `S` the spread
    of each statistic: `outputs = (inputs - mu) / sigma * clip(sigma + d_sigma, 0.1 sigma, 10 sigma) + mu + d_mu`. The
    coordinates start standard normal and are rescaled, per sample, to `sqrt(sum((d / S)^2)) = radius * sqrt(n)`, n
    statistics that vary. Structures:

    - `"diagonal"`: `d = S * eps`, `S` the standard deviation over the mini-batch;
    - `"low_rank"`: `d = eps @ M`, `M` the centred statistics of the mini-batch over `sqrt(batch - 1)`: their empirical
      covariance across channels and between means and deviations;
    - `"domain"`: the same with running means of each *experiment's* statistics: the directions in which experiments
      differ.

    Statistics are computed in float32 under every dtype policy. Spreads are constants to the gradient. On several
    replicas the mini-batch is that of all of them, and each draws its own noise. Without training, or (`"diagonal"`,
    `"low_rank"`) with a mini-batch of one sample, the layer is the identity.

    DSU (Li et al., "Uncertainty Modeling for Out-of-Distribution Generalization", ICLR 2022) is
    `FeatureStatisticsUncertainty(radius=None, probability=0.5)` after several stages of a network, but for the clip,
    which theirs lacks.

    Args:
        structure: `"diagonal"`, `"low_rank"` or `"domain"`. Default: `"low_rank"` with an adversary (`steps` of 1 or
            more), where it costs less accuracy than the other (recipes/results/ladder_low_rank), else
            `"diagonal"`.
        radius: rho > 0, length of a perturbation; 1 is the expected length of a standard normal draw. `None`: the
            normal draw itself, with gradients through the spread, as in DSU; for use of the layer by itself. Default
            0.15 (recipes/results/ladder_plate/radius.md).
        probability: in (0, 1], chance that the stage is perturbed in a step (all samples or none). Default 1; DSU's is
            0.5.
        perturbed_share: in (0, 1], chance of each sample to be perturbed at all; in an `ABRAModel` the same samples at
            every stage. Default 1.
        steps: K >= 0, ascent steps of `ABRAModel`'s search: 1 or more is the adversary, the worst case within the
            radius; 0 keeps the random draw. The layer by itself takes none. With f the share of the network's compute
            behind the first perturbed stage, K = 0 and K = 1 cost a step 1 + f, each further step 2f/3. Default 0: on
            no cellular screen could the worst case be told better than the random one (recipes/results/).
        step_size: eta >= 0, length of an ascent step in radii. From noise, a step of 0.5 leaves the perturbation mostly
            the random one; from 2 on the slope decides. Default 0.5.
        start: where the search starts: `"noise"` (default), a random perturbation of the whole radius, or `"zero"`, so
            that the first step alone decides the direction. It needs an ascent step, and perturbs nothing where there
            is no slope and before the adversary starts.
        learned_scale: whether the perturbation is random along directions that are learned: each coordinate of the
            draw times a scale of its own, a weight that climbs what the perturbed branch adds to the loss (alignment
            too) while all others descend it; in an `ABRAModel` after the `warmup`. The radius stays. It is an adversary
            of the screen and not of the sample, and cannot follow the class of one image. The idea is AdvStyle's (Zhang
            et al., arXiv 2301.12643), whose scale is the radius as well. Needs `steps=0` and a radius, and costs
            nothing that counts; not for `"low_rank"`, whose coordinates are the samples of a mini-batch. Weight decay
            pulls to equal scales; `optimizer.exclude_from_weight_decay(var_names=["log_scale"])` leaves them out.
            Default False.
        search_loss: what the search climbs: `"margin"` (default), the loss with the angular margin, or `"softmax"`, the
            margin-free cross-entropy, which costs a step f/3 more.
        adversary_every: n >= 1: the adversary acts in every n-th optimizer step, and in the others the random start
            stays; the cost is the same. Default 1.
        ramp_radius: whether the radius grows from 0 with the margin, over the `warmup` of `ABRAModel`. Default False.
        shared_by: `"experiment"`: samples of one experiment in the mini-batch get one perturbation, as a real batch
            effect is shared, and the search climbs the sum of their losses; needs experiment ids in training. Default
            `None`: each sample has its own.
        num_experiments: number of experiments, for `"domain"` only; ids are `0 .. num_experiments - 1`.
        experiment_groups: optional list of `num_experiments` integers, the group (cell type) of each experiment, for
            `"domain"`: means are centred within their group, so that cell types are not taken for batch effects.
        synchronized: whether `"diagonal"` and `"low_rank"` take the spread over the mini-batches of all replicas
            (default), as one device would, or each replica over its own part, as plain batch normalization does. The
            running means of `"domain"` are one state and always those of all replicas; so is everything on JAX, where
            the mini-batch is one array.
        seed: integer, for reproducible draws. Default: drawn.
        **kwargs: as for every Keras layer.

    Call arguments:
        inputs: `(batch, height, width, channels)`, of any float type, which the output has, too.
        experiment: int `(batch,)`; needed in training by `"domain"`.
        training: whether to perturb.

    Output shape:
        That of the input.

    Raises:
        ValueError: for an argument outside its range, inputs that are not of rank 4 or not of a float type, or
            experiment ids that are missing.

    Example:

    >>> layer = FeatureStatisticsUncertainty(structure="low_rank", radius=1.0, seed=0)
    >>> tuple(layer(keras.random.normal((4, 8, 8, 3)), training=True).shape)
    (4, 8, 8, 3)
    """

    MOMENTUM = 0.9  # of the experiments' running means

    def __init__(
        self,
        structure=None,
        radius=0.15,
        probability=1.0,
        perturbed_share=1.0,
        steps=0,
        step_size=0.5,
        start="noise",
        shared_by=None,
        search_loss="margin",
        adversary_every=1,
        ramp_radius=False,
        learned_scale=False,
        num_experiments=None,
        experiment_groups=None,
        synchronized=True,
        seed=None,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        numbers = (radius, probability, perturbed_share, steps, step_size, adversary_every, num_experiments)
        numbers = map(plain, numbers)
        radius, probability, perturbed_share, steps, step_size, adversary_every, num_experiments = numbers
        if structure is None:
            structure = "low_rank" if steps else "diagonal"
        if structure not in STRUCTURES:
            raise ValueError(f"`structure` must be one of {STRUCTURES}. Received: {structure!r}")
        if radius is not None and not (is_number(radius) and 0 < radius < math.inf):
            raise ValueError(f"`radius` must be a positive number, or None for DSU's draw. Received: {radius!r}")
        for name, value in (("probability", probability), ("perturbed_share", perturbed_share)):
            if not (is_number(value) and 0 < value <= 1):
                raise ValueError(f"`{name}` must lie in (0, 1]. Received: {value!r}")
        if not (is_integer(steps) and steps >= 0):
            raise ValueError(f"`steps` must be an integer of at least 0. Received: {steps!r}")
        if not (is_number(step_size) and 0 <= step_size < math.inf):
            raise ValueError(f"`step_size` must be a number of at least 0. Received: {step_size!r}")
        for name, value, choices in (("start", start, STARTS), ("search_loss", search_loss, SEARCH_LOSSES)):
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {choices}. Received: {value!r}")
        if not (is_integer(adversary_every) and adversary_every >= 1):
            raise ValueError(f"`adversary_every` must be an integer of at least 1. Received: {adversary_every!r}")
        if start == "zero" and steps == 0:
            raise ValueError(
                "`start` 'zero' needs an ascent step, `steps=1` or more: without one nothing is perturbed. "
                "Received: steps=0"
            )
        if steps == 0 and (step_size, search_loss, adversary_every) != (0.5, "margin", 1):
            warnings.warn(
                "`step_size`, `search_loss` and `adversary_every` belong to the adversary, and there is none: `steps` "
                "is 0. Give steps=1 or more, or none of them.",
                stacklevel=2,
            )
        if shared_by not in (None, "experiment"):
            raise ValueError(f"`shared_by` must be None or 'experiment'. Received: {shared_by!r}")
        for name, value in (
            ("synchronized", synchronized),
            ("ramp_radius", ramp_radius),
            ("learned_scale", learned_scale),
        ):
            if not isinstance(value, bool):
                raise ValueError(f"`{name}` must be True or False. Received: {value!r}")
        if learned_scale and (steps or radius is None or structure == "low_rank"):
            raise ValueError(
                "`learned_scale` needs steps=0, a radius, and structure 'diagonal' or 'domain'. Received: "
                f"steps={steps}, radius={radius}, structure={structure!r}"
            )
        _check_experiments(structure, num_experiments, experiment_groups)
        self.structure = structure
        self.radius = radius
        self.probability = probability
        self.perturbed_share = perturbed_share
        self.steps = steps
        self.step_size = step_size
        self.start = start
        self.shared_by = shared_by
        self.search_loss = search_loss
        self.adversary_every = adversary_every
        self.ramp_radius = ramp_radius
        self.learned_scale = learned_scale
        self.num_experiments = num_experiments
        self.experiment_groups = None if experiment_groups is None else [int(g) for g in experiment_groups]
        self.synchronized = synchronized
        self.seed = seed = plain(seed)
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.noise_generator = ReplicaSeedGenerator(apart(seed, 1, 0x85EBCA6B))

    def build(self, input_shape):
        if len(input_shape) != 4 or input_shape[-1] is None:
            raise ValueError(
                f"`{self.name}` needs feature maps (batch, height, width, channels) with known channels. "
                f"Received: input shape {tuple(input_shape)}"
            )
        if keras.config.image_data_format() == "channels_first":
            raise ValueError(f"`{self.name}` takes the last axis for channels. Received: 'channels_first'")
        self.channels = input_shape[-1]
        if self.structure == "domain":
            rows = self.num_experiments
            state = {"initializer": "zeros", "dtype": "float32", "trainable": False}  # alike in all replicas
            self.experiment_means = self.add_weight(shape=(rows, 2 * self.channels), name="experiment_means", **state)
            self.experiments_seen = self.add_weight(shape=(rows,), name="experiments_seen", **state)
        if self.learned_scale:
            columns = self.num_experiments if self.structure == "domain" else 2 * self.channels
            self.log_scale = self.add_weight(shape=(columns,), initializer="zeros", dtype="float32", name="log_scale")

    def call(self, inputs, experiment=None, training=None):
        self._check_type(inputs)
        if not training:
            return inputs
        statistics = ops.concatenate(feature_statistics(inputs), axis=-1)
        if self.radius is not None:
            statistics = ops.stop_gradient(statistics)
        uncertain = self.uncertainty(statistics, experiment)
        batch = ops.shape(inputs)[0]
        coordinates = self.share(uncertain, self.draw(uncertain, batch), experiment)
        if self.learned_scale:
            log_scale = ops.convert_to_tensor(self.log_scale)
            reversed_gradient = 2.0 * ops.stop_gradient(log_scale) - log_scale
            coordinates = uncertainty.stretch(uncertain, coordinates, reversed_gradient)
        coordinates = coordinates * self.draw_active() * self.draw_perturbed(batch)
        outputs, _ = shift_statistics(inputs, uncertainty.offsets(uncertain, coordinates))
        self.update_means(ops.stop_gradient(statistics), experiment)
        return outputs

    def _check_type(self, inputs):
        if not keras.backend.is_float_dtype(inputs.dtype):
            raise ValueError(
                f"`{self.name}` takes feature maps of a float type: statistics move by parts of a grey level. "
                f"Received: {keras.backend.standardize_dtype(inputs.dtype)}. Put keras.layers.Rescaling before it."
            )

    def compute_output_spec(self, inputs, experiment=None, training=None):
        self._check_type(inputs)
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)

    def uncertainty(self, statistics, experiment=None):
        """The `keras_abra.uncertainty.Uncertainty` of these statistics `(batch, 2 * channels)`."""
        if self.structure == "diagonal":
            return uncertainty.diagonal(statistics, self.synchronized)
        if self.structure == "low_rank":
            return uncertainty.low_rank(statistics, self.synchronized)
        self._check_experiment(experiment, "structure 'domain'")
        groups = self.experiment_groups or [0] * self.num_experiments
        one_hot = ops.one_hot(ops.convert_to_tensor(groups, "int32"), max(groups) + 1, dtype="float32")
        return uncertainty.domain(
            ops.convert_to_tensor(self.experiment_means), ops.convert_to_tensor(self.experiments_seen), one_hot
        )

    def draw(self, uncertain, batch):
        """Random coordinates for each of `batch` samples, rescaled to the radius (not if that is None)."""
        shape = (batch, uncertain.coordinates)
        coordinates = keras.random.normal(shape, dtype="float32", seed=self.noise_generator)
        if self.radius is None:
            return coordinates
        return uncertainty.rescale(uncertain, coordinates, self.length(uncertain))

    def share(self, uncertain, coordinates, experiment):
        """One random draw for all samples of an experiment, made of their own; with `shared_by`."""
        if self.shared_by is None:
            return coordinates
        self._check_experiment(experiment, "shared_by='experiment'")
        same = _same_experiment(experiment)
        coordinates = ops.matmul(same, backend.global_rows(coordinates))
        if self.radius is None:  # the scaled sum of normal draws is one
            return coordinates / ops.sqrt(ops.sum(same, axis=-1, keepdims=True))
        return uncertainty.rescale(uncertain, coordinates, self.length(uncertain))

    def first_point(self, uncertain, coordinates, experiment):
        """Where the search starts, from the coordinates drawn."""
        shared = self.share(uncertain, coordinates, experiment)
        return ops.zeros_like(shared) if self.start == "zero" else shared

    def shared_slopes(self, slopes, experiment):
        """The slope of each sample's perturbation, from the loss's gradient by each sample's offsets."""
        if self.shared_by is None:
            return slopes
        same, rows = _same_experiment(experiment), backend.global_rows(slopes)
        finite = ops.all(ops.isfinite(rows), axis=-1, keepdims=True)
        spoiled = ops.matmul(same, 1.0 - ops.cast(finite, "float32")) > 0  # an experiment's, and not all others'
        return ops.where(spoiled, float("nan"), ops.matmul(same, ops.where(finite, rows, 0.0)))

    def draw_active(self):
        """1.0 with the stage's probability, else 0.0."""
        if self.probability == 1:
            return ops.ones((), "float32")
        chance = keras.random.uniform((), dtype="float32", seed=self.seed_generator)
        return ops.cast(chance < self.probability, "float32")

    def draw_perturbed(self, batch):
        """Float32 `(batch, 1)`: 1 for the samples that are perturbed; a scalar 1 if all are."""
        if self.perturbed_share == 1:
            return ops.ones((), "float32")
        chance = keras.random.uniform((batch, 1), dtype="float32", seed=self.noise_generator)
        return ops.cast(chance < self.perturbed_share, "float32")

    def length(self, uncertain):
        """`radius * sqrt(n)`, scalar."""
        return uncertainty.radius(uncertain, self.radius)

    def update_means(self, statistics, experiment):
        """Moves the running means of the experiments in this (global) mini-batch; `"domain"` only."""
        if self.structure != "domain":
            return
        members = ops.one_hot(ops.cast(ops.reshape(experiment, (-1,)), "int32"), self.num_experiments, dtype="float32")
        counts = backend.global_sum(ops.sum(members, axis=0))
        # A sum and no product of matrices, see `uncertainty.domain`.
        sums = backend.global_sum(ops.sum(members[:, :, None] * statistics[:, None], axis=0))
        means = sums / ops.maximum(counts, 1.0)[:, None]
        known, old = ops.convert_to_tensor(self.experiments_seen), ops.convert_to_tensor(self.experiment_means)
        moved = ops.where(known[:, None] > 0, self.MOMENTUM * old + (1 - self.MOMENTUM) * means, means)
        self.experiment_means.assign(ops.where(counts[:, None] > 0, moved, old))
        self.experiments_seen.assign(ops.maximum(known, ops.cast(counts > 0, "float32")))

    def _check_experiment(self, experiment, why):
        if experiment is None:
            raise ValueError(
                f"`{self.name}` has {why} and needs experiment ids in training. Expected: int (batch,), "
                "given to ABRAModel as {'image': ..., 'experiment': ...}. Received: None"
            )

    def compute_output_shape(self, input_shape, *args, **kwargs):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "structure": self.structure,
            "radius": self.radius,
            "probability": self.probability,
            "perturbed_share": self.perturbed_share,
            "steps": self.steps,
            "step_size": self.step_size,
            "start": self.start,
            "shared_by": self.shared_by,
            "search_loss": self.search_loss,
            "adversary_every": self.adversary_every,
            "ramp_radius": self.ramp_radius,
            "learned_scale": self.learned_scale,
            "num_experiments": self.num_experiments,
            "experiment_groups": self.experiment_groups,
            "synchronized": self.synchronized,
            "seed": self.seed,
        }


def _same_experiment(experiment):
    """Float32 `(batch, global batch)`: 1 where a sample of this replica and one of the mini-batch share theirs."""
    own = ops.cast(ops.reshape(experiment, (-1, 1)), "int32")
    return ops.cast(own == ops.transpose(backend.global_rows(own)), "float32")


def _check_experiments(structure, num_experiments, groups):
    if structure != "domain":
        if num_experiments is not None or groups is not None:
            raise ValueError(
                "`num_experiments` and `experiment_groups` belong to structure 'domain'. "
                f"Received: structure={structure!r}, num_experiments={num_experiments}, experiment_groups={groups}"
            )
        return
    if not (is_integer(num_experiments) and num_experiments >= 2):
        raise ValueError(
            f"Structure 'domain' is what differs between experiments: `num_experiments` must be an integer of at least "
            f"2. Received: {num_experiments!r}"
        )
    if groups is not None and (len(groups) != num_experiments or min(groups) < 0):
        raise ValueError(
            f"`experiment_groups` must give one group number >= 0 for each of the {num_experiments} experiments. "
            f"Received: {groups}"
        )
    if groups is not None and len(set(groups)) == num_experiments:
        raise ValueError(
            "Structure 'domain' is what differs between experiments of one group, and in `experiment_groups` no two "
            f"experiments share one: nothing would be perturbed. Leave the argument out, or give fewer groups. "
            f"Received: {groups}"
        )
