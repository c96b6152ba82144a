"""ABRA's step as others would write it in PyTorch, to be timed beside ours. Torch only; not for use."""

import keras
import torch

from keras_abra import ABRAModel, uncertainty
from keras_abra.fused_step import StepResult
from keras_abra.losses import softmax_cross_entropy


class NaiveABRA(ABRAModel):
    """The same mathematics (K = 1, a diagonal or low-rank structure), one whole pass for each thing: search, clean,
    perturbed.

    `everything`: whether the search's backward pass goes to all weights (`loss.backward()`), not to the offsets alone.
    """

    everything = False

    def whole_pass(self, image, labels, offsets):
        return self.from_features(self.run_prefix(image), labels, offsets)

    def from_features(self, z, labels, offsets):
        features, statistics = self.run_suffix(z, offsets, self.branches.clean)
        _, cosine = self.embed_features(features, training=True)
        margin = self.loss_function.margin_logits(labels, cosine, self.ramp.margin_factor())
        return torch.mean(softmax_cross_entropy(labels, margin)), cosine * self.loss_function.scale, statistics

    def zeros(self, like, grad=False):
        shapes = [(len(like), 2 * stage.channels) for stage in self.stages]
        return [torch.zeros(shape, device=like.device, requires_grad=grad) for shape in shapes]

    def worst_case(self, statistics, slopes, experiment):
        worst, (step_size, _) = [], self.search_pace()
        for stage, m, slope in zip(self.stages, statistics, slopes, strict=True):
            space = stage.uncertainty(m.detach(), experiment)
            start = stage.first_point(space, stage.draw(space, len(m)), experiment)
            point = uncertainty.ascend(space, start, slope, stage.length(space), step_size)
            worst.append(uncertainty.offsets(space, point) * stage.draw_active())
        return worst

    def fused_step(self, linearize, trainable, state, x, y, sample_weight, loss_scale):
        image, experiment = self.unpack_inputs(x)
        with torch.enable_grad():
            offsets = self.zeros(image, grad=True)
            with keras.StatelessScope():  # the search moves no batch norm
                loss, _, statistics = self.whole_pass(image, y, offsets)
            sources = [*offsets, *trainable] if self.everything else offsets
            slopes = torch.autograd.grad(loss, sources, allow_unused=True)[: len(offsets)]
            with torch.no_grad():
                worst = self.worst_case(statistics, slopes, experiment)
            clean_loss, logits, _ = self.whole_pass(image, y, self.zeros(image))
            with keras.StatelessScope():
                perturbed_loss, new_logits, _ = self.whole_pass(image, y, worst)
            divergence = torch.mean(self.alignment.call(logits.detach(), new_logits))
            return self.result(trainable, state, logits, clean_loss, perturbed_loss, divergence)

    def result(self, trainable, state, logits, clean_loss, perturbed_loss, divergence):
        loss = clean_loss + self.perturbed_weight * perturbed_loss + self.alignment.weight * divergence
        gradients = torch.autograd.grad(loss, trainable, allow_unused=True)
        losses = {"loss": loss, "clean_loss": clean_loss, "perturbed_loss": perturbed_loss, "alignment": divergence}
        losses = {name: value.detach() for name, value in losses.items()}
        losses["gain"] = losses["perturbed_loss"] - losses["clean_loss"]
        return StepResult(gradients, state, losses, logits.detach(), loss_scale=1.0)


class AdvBN(NaiveABRA):
    """AdvBN's recipe (Shu et al., NeurIPS 2021; azshue/AdvBN): one perturbation for the whole batch, six sign steps.

    As published: step 0.2 and bound 1.1 relative to the statistics, clean plus perturbed loss. Other than published,
    the part before the perturbation is trained as well (once forward, once back), and there is one set of batch norms.
    """

    def fused_step(self, linearize, trainable, state, x, y, sample_weight, loss_scale):
        image, _ = self.unpack_inputs(x)
        with torch.enable_grad():
            z = self.run_prefix(image)
            mean, std = z.detach().mean((0, 1, 2)), z.detach().std((0, 1, 2))
            unit = torch.cat([mean, std])[None]
            factors = torch.zeros_like(unit)
            with keras.StatelessScope():
                for _ in range(6):
                    factors.requires_grad_(True)
                    loss, _, _ = self.from_features(z.detach(), y, [(factors * unit).expand(len(z), -1)])
                    (slope,) = torch.autograd.grad(loss, factors)
                    factors = torch.clamp(factors.detach() + 0.2 * torch.sign(slope), -1.1, 1.1)
            clean_loss, logits, _ = self.from_features(z, y, self.zeros(z))
            with keras.StatelessScope():
                worst = [(factors * unit).expand(len(z), -1)]
                perturbed_loss, _, _ = self.from_features(z, y, worst)
            return self.result(trainable, state, logits, clean_loss, perturbed_loss, torch.zeros((), device=z.device))
