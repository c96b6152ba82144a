import contextlib
import warnings

import keras
from keras import ops

from keras_abra import backend, checks, data_checks, fit_arguments
from keras_abra.backbone_cut import cut_backbone
from keras_abra.feature_statistics import shift_statistics
from keras_abra.fused_step import fused_step
from keras_abra.kinds import plain
from keras_abra.layers import CosineHead, FeatureStatisticsUncertainty
from keras_abra.layers.feature_statistics_uncertainty import apart
from keras_abra.losses import ArcFace, DistributionAlignment, softmax_cross_entropy
from keras_abra.models.embedder import Embedder, run_alike
from keras_abra.neck import embedding_neck
from keras_abra.perturbed_norms import Branches, layers_within
from keras_abra.ramp import Ramp

LOGS = ("clean_loss", "perturbed_loss", "alignment", "gain")


@keras.saving.register_keras_serializable("keras_abra")
class ABRAModel(backend.Trainer, keras.Model):
    """Image classifier trained against shifts of its feature statistics, random or worst-case (ABRA).

    For models that must name a treatment in experiments they have never seen. Every training step perturbs the channel
    statistics of the feature maps after `perturb_after` within their uncertainty, at random or (`uncertainty` with
    `steps=1` or more) in the direction that raises the loss, and minimizes `clean + perturbed_weight * perturbed +
    alignment.weight * D(clean, perturbed)`, the first two being cross-entropies of cosines with an angular margin.
    Without `perturb_after` there is one branch: the margin loss alone.

    The step is fused: with f the share of the compute behind the first perturbed stage it costs 1 + f ordinary steps.
    `evaluate` and `predict` are those of the plain network: no perturbation, no experiment ids, no margin.

    Layers may be frozen by `trainable = False`, with a `compile` after it; a saved model keeps that.

    Reference: an independent reconstruction of arXiv 2603.05622; the README says what is known of the paper.

    Args:
        backbone: Functional `keras.Model`, images `(batch, height, width, channels)` to one feature map or vector. Its
            layers are shared, not copied.
        num_classes: integer of at least 2.
        perturb_after: names of backbone layers whose output is perturbed; every path must go through each. The first
            one decides f, and with it what a step costs; further ones cost nothing that counts.
        embedding_dim: size of the embedding behind a BatchNormalization-Dense-BatchNormalization neck; `None`: the
            pooled features themselves. Default 1024, that of the first place of RxRx1's Kaggle competition. It is
            `synchronized` over the replicas if the backbone's batch normalization is.
        uncertainty: a `FeatureStatisticsUncertainty`, the template of every stage. Default: diagonal, radius 0.15, no
            ascent step, a random perturbation; with `steps=1` or more it is the worst case, as in the paper.
        loss: `ArcFace` (default, margin 0.5 radians, scale 30) or `CosFace`.
        alignment: a `DistributionAlignment`. Default: symmetric KL, weight 1.
        perturbed_weight: >= 0, weight of the perturbed branch's loss. Default 1.
        warmup: length of the ramp over which the margin grows from 0, and after which the adversary starts: a number of
            optimizer steps (int), or a share of all steps of `fit` (float in [0, 1)). Default 0.1. `train_on_batch`
            knows no number of all steps and takes a float as no ramp. The ramp is a weight of the model: it is saved,
            and a later `fit` does not start it anew.
        class_names: optional names of the classes, saved with the model.
        perturbed_norms: how batch normalization works in the perturbed branch: `"own"` (default), by the statistics of
            its own mini-batch, which take back what all samples share; `"clean"`, by those of the clean branch;
            `"moving"`, by the moving statistics; `"auxiliary"`, by its own and with weights of its own, which inference
            does not use, as in AdvProp (Xie et al., CVPR 2020). With all but `"own"` the first ascent direction needs a
            pass of its own, and costs as much as a further one.
        **kwargs: as for `keras.Model`.

    Call arguments:
        inputs: images, float or uint8 `(batch, height, width, channels)`, or `{"image": ..., "experiment": int
            (batch,)}`.

    Returns:
        float32 logits `(batch, num_classes)`: scale * cosine. Labels in `fit` and `evaluate` are integers `(batch,)`,
        or shares of the classes `(batch, num_classes)` that add up to 1, as CutMix and mixup give them: then each class
        has its share of the margin. Metrics go by the labels' kind: validation data need labels of the same one.

    Raises:
        ValueError: for a backbone that is not Functional, a cut that is not valid (the valid ones are listed),
            arguments or inputs of the wrong kind or range.

    Example:

    >>> image = keras.Input((16, 16, 6))
    >>> x = keras.layers.Conv2D(8, 3, activation="relu", name="stem")(image)
    >>> backbone = keras.Model(image, keras.layers.Conv2D(8, 3, activation="relu")(x))
    >>> model = ABRAModel(backbone, num_classes=5, perturb_after=["stem"], embedding_dim=16)
    >>> model.compile(optimizer=keras.optimizers.AdamW(1e-3), metrics=["accuracy"])
    >>> images, labels = keras.random.normal((8, 16, 16, 6)), keras.ops.arange(8) % 5
    >>> sorted(model.fit(images, labels, verbose=0).history)
    ['accuracy', 'alignment', 'clean_loss', 'gain', 'loss', 'perturbed_loss']
    >>> model.predict(images, verbose=0).shape
    (8, 5)
    """

    def __init__(
        self,
        backbone,
        num_classes,
        perturb_after=(),
        embedding_dim=1024,
        uncertainty=None,
        loss=None,
        alignment=None,
        perturbed_weight=1.0,
        warmup=0.1,
        class_names=None,
        perturbed_norms="own",
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)  # images go to the backbone as they are, as they do in training
        numbers = (num_classes, embedding_dim, perturbed_weight, warmup)
        num_classes, embedding_dim, perturbed_weight, warmup = map(plain, numbers)
        self._template = _Untracked(FeatureStatisticsUncertainty() if uncertainty is None else uncertainty)
        self.loss_function = ArcFace() if loss is None else loss
        self.alignment = DistributionAlignment() if alignment is None else alignment
        checks.check_arguments(
            self.uncertainty,
            self.loss_function,
            self.alignment,
            embedding_dim,
            perturbed_weight,
            perturbed_norms,
            warmup,
            class_names,
            num_classes,
        )
        listed = isinstance(perturb_after, list | tuple) and all(isinstance(name, str) for name in perturb_after)
        if not listed:
            raise ValueError(f"`perturb_after` must be a list of layer names. Received: {perturb_after!r}")
        if keras.config.image_data_format() == "channels_first":
            raise ValueError(
                "ABRAModel takes images with channels last. Received: image_data_format() = 'channels_first'"
            )
        parts = cut_backbone(backbone, perturb_after)
        backend.take_noise_from_state(layers_within(backbone))  # the branches must have the same masks
        self.backbone = backbone
        self.num_classes = num_classes
        self.perturb_after = list(perturb_after)
        self.embedding_dim = embedding_dim
        self.perturbed_weight = float(perturbed_weight)
        self.perturbed_norms = perturbed_norms
        self.warmup = warmup
        self.class_names = None if class_names is None else [str(name) for name in class_names]

        self.pooling = _pooling(backbone.outputs[0], self.dtype_policy)
        features = int(backbone.outputs[0].shape[-1])
        self.neck = None
        if embedding_dim is not None:
            synchronized = any(
                isinstance(layer, keras.layers.BatchNormalization) and layer.synchronized
                for layer in layers_within(backbone)
            )
            self.neck = embedding_neck(features, embedding_dim, self.dtype_policy, synchronized)
        self.head = CosineHead(num_classes, dtype=self.dtype_policy, name="head")
        self.head.build((None, embedding_dim or features))
        self.stages = [_stage(self.uncertainty, i, part.outputs[0].shape) for i, part in enumerate(parts[:-1])]
        self.ramp = Ramp(name="ramp")
        if isinstance(warmup, int):
            self.ramp.start(warmup)
        self._parts = _Untracked(parts)
        self._branches = _Untracked(Branches(perturbed_norms, parts[1:], self.neck))
        self.auxiliary_norms = self.branches.auxiliary
        self._embedder = _Untracked(None)
        self._trackers = [keras.metrics.Mean(name=name) for name in (LOGS if self.stages else LOGS[:1])]
        self._skipped = keras.metrics.Sum(name="skipped")
        self.skip_non_finite = False  # set by `fit`, see `SkipNonFinite`
        self._evaluating = False
        self.build(tuple(backbone.inputs[0].shape))

    def build(self, input_shape=None):
        self.built = True

    @property
    def uncertainty(self):
        """The template that the stages were made of; what is changed in it afterwards is not promised to act."""
        return self._template.value

    @property
    def backbone_parts(self):
        """The backbone's parts between the perturbed stages, sharing its layers: see `cut_backbone`."""
        return self._parts.value

    @property
    def branches(self):
        """The `keras_abra.perturbed_norms.Branches` behind the first perturbed stage."""
        return self._branches.value

    # Inference: the plain network.

    def call(self, inputs, training=None):
        image, _ = self.unpack_inputs(inputs)
        _, cosine = self.embed_features(self.backbone(image, training=training), training=training)
        return cosine * self.loss_function.scale

    def embed(self, x, batch_size=None, verbose="auto", steps=None):
        """L2-normalized embeddings, float32 NumPy `(samples, embedding_dim)`. Arguments as for `predict`."""
        if self._embedder.value is None:
            self._embedder.value = run_alike(Embedder(self), self)
        data_checks.check_division(x, batch_size)
        return self._embedder.value.predict(x, batch_size=batch_size, verbose=verbose, steps=steps)

    def embed_features(self, features, training, branch=None):
        """Backbone output to `(embedding, cosine)`, float32 `(batch, dim)`, not normalized, and `(batch, classes)`."""
        if self.pooling is not None:
            features = self.pooling(features)
        if self.neck is not None:
            neck = self.neck if branch is None else branch.neck
            features = neck(features, training=training)
        return ops.cast(features, "float32"), self.head(features)

    def unpack_inputs(self, inputs):
        """`(image, experiment or None)`, checked: see `keras_abra.checks.unpack_inputs`."""
        return checks.unpack_inputs(inputs, self.backbone.inputs[0])

    # Training. `fused_step` runs these with the values of the variables of the pass it computes.

    one_sample_message, no_sample_message = checks.ONE_SAMPLE, checks.NO_SAMPLE

    def fused_step(self, *args):
        """Gradients, state, losses and logits of one step: see `keras_abra.fused_step.fused_step`."""
        return fused_step(self, *args)

    def run_prefix(self, image):
        """The backbone up to the first perturbed stage."""
        return self.backbone_parts[0](image, training=True)

    def run_suffix(self, x, offsets, branch):
        """From there to the backbone's output, each stage's statistics moved by its offsets: `(output, statistics)`."""
        statistics = []
        for part, offset in zip(branch.parts, offsets, strict=True):
            x, found = shift_statistics(x, offset)
            statistics.append(found)
            x = part(x, training=True)
        return x, statistics

    def mask_seeds(self):
        """Seeds of the network's random masks (dropout), of which each replica needs its own; whether a stage inside
        the backbone acts is for all replicas to decide alike."""
        inside = [layer for layer in layers_within(self.backbone) if isinstance(layer, FeatureStatisticsUncertainty)]
        alike = {id(v) for layer in [*inside, *self.stages] for v in layer.non_trainable_variables}
        seeds = [v for v in self.non_trainable_variables if v.path.endswith("seed_generator_state")]
        return [v for v in seeds if id(v) not in alike]

    def search_pace(self):
        """Ascent step in radii, 0 until the ramp has ended and in steps without adversary; and share of the radius."""
        step_size = self.uncertainty.step_size * self.ramp.adversary_started()
        if self.uncertainty.adversary_every > 1:
            step_size *= self.ramp.is_multiple(self.uncertainty.adversary_every)
        return step_size, self.ramp.margin_factor() if self.uncertainty.ramp_radius else None

    def learned_scales(self):
        """The stages' logarithms of scale, and 1.0 from the end of the ramp on, else 0.0."""
        return [stage.log_scale.value for stage in self.stages], self.ramp.adversary_started()

    def is_finite(self, result):
        """Whether loss and gradients of a step are, a scalar, on all replicas alike."""
        finite = ops.logical_and(ops.isfinite(result.losses["loss"]), self._gradients_finite(result))
        return backend.global_sum(1.0 - ops.cast(finite, "float32")) == 0

    def _gradients_finite(self, result):
        finite = [ops.all(ops.isfinite(g)) for g in result.gradients if g is not None]
        finite = ops.all(ops.stack(finite)) if finite else ops.convert_to_tensor(True)
        if hasattr(self.optimizer, "inner_optimizer"):  # a loss scale finds its size by overflows, until none is left
            finite = ops.logical_or(finite, result.loss_scale >= 1.0)
        return finite

    def log_skipped(self, number):
        """Counts a step that was left out, and returns the logs without it."""
        self._skipped.update_state(number / backend.replicas())
        return self.get_metrics_result()

    def update_logs(self, result, x, y, sample_weight):
        """Updates every metric of the training step and returns the logs. The loss is NaN if a gradient is."""
        batch = ops.shape(result.logits)[0]
        loss = result.losses["loss"]
        if not self.skip_non_finite:
            loss = ops.where(self._gradients_finite(result), loss, float("nan"))
        self._loss_tracker.update_state(loss, sample_weight=batch)
        for tracker in self._trackers:
            tracker.update_state(result.losses[tracker.name], sample_weight=batch)
        return self.compute_metrics(x, y, result.logits, sample_weight=sample_weight)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=False):
        """Margin-free cross-entropy: the loss of `evaluate`. `fit` does not call it: what it minimizes are `loss`,
        `alignment` and what layers add by `add_loss`."""
        return _CrossEntropy()(y, y_pred, sample_weight=sample_weight)

    def get_metrics_result(self):
        results = super().get_metrics_result()
        hidden = {*(LOGS if self._evaluating else ()), *(() if self.skip_non_finite else ("skipped",))}
        return {k: v for k, v in results.items() if k not in hidden}

    @contextlib.contextmanager
    def _evaluation(self):
        before = self._evaluating, self.skip_non_finite
        self._evaluating, self.skip_non_finite = True, False
        try:
            yield
        finally:
            self._evaluating, self.skip_non_finite = before

    def compile(self, optimizer="rmsprop", loss=None, jit_compile="auto", **kwargs):
        """As `keras.Model.compile`, but the loss is an argument of the model itself, so that it is saved and tuned with
        it.

        Raises:
            ValueError: if a loss or loss weights are given, or a metric has the name of a log of `fit`; under a
                TensorFlow distribution strategy for `jit_compile=True` and what `keras_abra.checks.check_mirrored`
                names.
        """
        if loss is not None:
            raise ValueError(
                f"The loss belongs to the model: ABRAModel(..., loss=ArcFace(...)). Received in compile: {loss!r}"
            )
        if kwargs.get("loss_weights") is not None:
            raise ValueError(
                "The weights of the losses are arguments of the model: `perturbed_weight`, and `weight` of "
                f"DistributionAlignment. Received in compile: loss_weights={kwargs['loss_weights']!r}"
            )
        strategy = getattr(self, "distribute_strategy", None)  # TensorFlow's
        mirrored = strategy is not None and strategy.num_replicas_in_sync > 1
        if jit_compile is True and mirrored:
            raise ValueError(
                "jit_compile=True does not work under a tf.distribute strategy (XLA cannot reach the replicas' "
                "variables). Leave jit_compile at 'auto'."
            )
        checks.check_metrics(kwargs, (*LOGS, "skipped"))
        own = type(self)
        if own.compute_loss is not ABRAModel.compute_loss and own.train_step is ABRAModel.train_step:
            warnings.warn(
                f"{own.__name__} has a `compute_loss` of its own: `evaluate` takes it and `fit` does not, which "
                "minimizes the model's `loss` and `alignment`. Give a loss with `margin_logits`, or `add_loss` in a "
                "layer.",
                stacklevel=2,
            )
        self.branches.freeze_alike()
        self._embedder.value = None  # its compiled function is of what was trainable then
        super().compile(optimizer=optimizer, loss=None, jit_compile=jit_compile, **kwargs)
        if mirrored:
            checks.check_mirrored(self.optimizer, self.steps_per_execution, self.run_eagerly)
        self._requested_jit_compile = jit_compile  # Keras keeps what "auto" came to, which another backend may not have

    def quantize(self, *args, **kwargs):
        """As `keras.Model.quantize`: backbone and neck; the head's cosines stay float32."""
        super().quantize(*args, **kwargs)
        self._embedder.value = None

    def get_compile_config(self):
        return {**super().get_compile_config(), "jit_compile": self._requested_jit_compile} if self.compiled else None

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    @property
    def input_dtype(self):
        """That of the backbone's images, whatever it computes in."""
        return self.backbone.inputs[0].dtype

    def export(self, *args, **kwargs):
        """As `keras.Model.export`: the plain network."""
        if not self._called:  # training takes the network in parts
            self(keras.Input(batch_shape=self.backbone.inputs[0].shape, dtype=self.input_dtype))
        return super().export(*args, **kwargs)

    def train_on_batch(self, x, y=None, *args, **kwargs):
        data_checks.check_data(self, x, y)
        self._set_skipping(False)
        with data_checks.plain_errors():
            return super().train_on_batch(x, y, *args, **kwargs)

    def fit(self, *args, **kwargs):
        """As `keras.Model.fit`. Checks labels and ids on the host, and stops at a loss or gradient that is not finite;
        with a `SkipNonFinite` among the callbacks it leaves such a step out.

        Raises:
            ValueError: for labels or experiment ids outside their range and for training batches of one sample, in
                arrays and `tf.data` pipelines. (From other sources a label outside its range gives a loss of NaN.)
            NonFiniteLossError: naming epoch and step.
        """
        self._assert_compile_called("fit")
        arguments = fit_arguments.bind(super().fit, args, kwargs)
        fit_arguments.check(self, arguments)
        self._set_skipping(fit_arguments.watch_finite(arguments))
        if isinstance(self.warmup, float) and not self.ramp.has_begun():
            self.ramp.start(fit_arguments.ramp_length(self, arguments))
        with data_checks.plain_errors():
            return super().fit(**arguments)

    def _set_skipping(self, skip):
        if skip != self.skip_non_finite:
            self.skip_non_finite, self.train_function = skip, None

    def _symbolic_build(self, iterator=None, data_batch=None):
        if data_batch is None:
            data_batch = self._symbolic_batch(iterator)
        super()._symbolic_build(iterator=iterator, data_batch=data_batch)

    def _symbolic_batch(self, iterator):
        dataset = getattr(getattr(iterator, "data_adapter", None), "_dataset", None)
        return fit_arguments.symbolic_batch(dataset)

    def evaluate(self, *args, **kwargs):
        """As `keras.Model.evaluate`: margin-free cross-entropy and the compiled metrics."""
        arguments = fit_arguments.bind(super().evaluate, args, kwargs)
        if not arguments.get("_use_cached_eval_dataset"):
            fit_arguments.check(self, arguments, training=False)
        with self._evaluation(), data_checks.plain_errors():
            return super().evaluate(**arguments)

    def predict(self, x, batch_size=None, *args, **kwargs):
        data_checks.check_division(x, batch_size)
        return super().predict(x, batch_size, *args, **kwargs)

    def test_on_batch(self, x, y=None, *args, **kwargs):
        data_checks.check_data(self, x, y, training=False)
        with self._evaluation():
            return super().test_on_batch(x, y, *args, **kwargs)

    def said_by_names(self):
        """What the model was told by names that another process may count otherwise, for `ResumableRun` to compare."""
        names = [layer.name for layer in self.backbone.layers]
        cuts = [names.index(name) for name in self.perturb_after]
        return {"class_names": self.class_names, "perturb_after, by the layers' numbers,": cuts}

    def get_config(self):
        objects = {
            "backbone": self.backbone,
            "uncertainty": self.uncertainty,
            "loss": self.loss_function,
            "alignment": self.alignment,
        }
        return {
            **super().get_config(),
            **{name: keras.saving.serialize_keras_object(value) for name, value in objects.items()},
            "num_classes": self.num_classes,
            "perturb_after": self.perturb_after,
            "embedding_dim": self.embedding_dim,
            "perturbed_weight": self.perturbed_weight,
            "perturbed_norms": self.perturbed_norms,
            "warmup": self.warmup,
            "class_names": self.class_names,
            "frozen": [i for i, layer in enumerate(self._own_layers()) if not layer.trainable],
            "changed": {
                str(i): changes for i, layer in enumerate(self._own_layers()) if (changes := self._changes(layer))
            },
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        names = ("backbone", "uncertainty", "loss", "alignment")
        objects = {n: keras.saving.deserialize_keras_object(config[n], custom_objects=custom_objects) for n in names}
        config = {**config, **objects}
        frozen, changed = config.pop("frozen", ()), config.pop("changed", {})
        model = cls(**config)
        own = model._own_layers()
        for i, changes in changed.items():
            if "lora" in changes:
                own[int(i)].enable_lora(**changes["lora"])
            if "dtype" in changes:
                own[int(i)].dtype_policy = keras.saving.deserialize_keras_object(changes["dtype"])
            if "quantized" in changes:
                how = {k: keras.saving.deserialize_keras_object(v) for k, v in changes["quantized"].items()}
                own[int(i)].quantize(**how)
        for i in frozen:
            own[i].trainable = False
        return model

    def _changes(self, layer):
        """What was done to one of our own layers after it was made: dtype policy or quantization, LoRA."""
        changes, policy = {}, self.dtype_policy
        if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
            policy = policy[layer.path]
        found, mode = layer.dtype_policy, getattr(layer.dtype_policy, "quantization_mode", None)
        if mode is not None:
            how = {"mode": mode, "config": getattr(layer, "quantization_config", None)}  # older releases have no config
            how = {k: v for k, v in how.items() if v is not None}
            changes["quantized"] = {k: keras.saving.serialize_keras_object(v) for k, v in how.items()}
            found = keras.dtype_policies.get(found._source_name)
        if found != policy and not any(layer is stage for stage in self.stages):
            changes["dtype"] = keras.saving.serialize_keras_object(found)
        if getattr(layer, "lora_enabled", False):
            changes["lora"] = {"rank": layer.lora_rank, "lora_alpha": layer.lora_alpha}
        return changes

    def _own_layers(self):
        """Those beside the backbone, which no config but this one knows."""
        return [*(self.neck.layers if self.neck else ()), self.head, *self.stages]


class _Untracked:
    """Keeps layers out of Keras's list of sublayers: parts that share the backbone's layers, and the stages'
    template."""

    def __init__(self, value):
        self.value = value


class _CrossEntropy(keras.losses.Loss):
    def __init__(self):
        super().__init__(name="cross_entropy", dtype="float32")  # another `floatx` would round the labels

    def call(self, y_true, y_pred):
        return softmax_cross_entropy(y_true, y_pred)


def _pooling(output, dtype):
    match len(output.shape):
        case 4:
            return keras.layers.GlobalAveragePooling2D(dtype=dtype, name="pooling")
        case 3:  # tokens of a vision transformer
            return keras.layers.GlobalAveragePooling1D(dtype=dtype, name="pooling")
        case 2:
            return None
    raise ValueError(f"The backbone's output must have rank 2, 3 or 4. Received: shape {tuple(output.shape)}")


def _stage(template, index, shape):
    config = {**template.get_config(), "name": f"uncertainty_{index + 1}", "seed": apart(template.seed, index)}
    stage = type(template).from_config(config)
    stage.build(shape)
    return stage
