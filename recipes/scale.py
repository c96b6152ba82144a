"""What 90 epochs of the real screens would take, on paper: no measurement, a roofline with its assumptions.

    python recipes/scale.py

A step costs the larger of its floating-point operations over what the GPU's tensor cores do, and its bytes over what
its memory moves; ResNet-50 is bound by the latter. Operations are counted from the model. Bytes: every convolution's
output in 16 bits, 5 times in the forward pass (written, read for the statistics of batch norm, read and written by
normalization and ReLU, read by the next layer) and 9 times in the backward pass (read for the reductions of batch norm
twice; read twice and written once for the gradient; read and written, and read twice, by the two products of the
convolution). ABRA repeats this behind the first perturbed stage, and reads and writes that stage's output 4 times more.

Share of the GPU's memory bandwidth that is reached: 0.65. At it the same arithmetic gives 7,300 images/s on an H100 for
ResNet-50 at 224 px, where MLPerf Training v3.0 has about 6,900 (13.5 minutes on eight, taken as 35 epochs of 1.28
million images). That is a tuned implementation: these hours are a best case, with data that arrive in time.
"""

import math

import keras

from keras_abra import ABRAModel, multiply_adds, step_cost

H100 = {"flops": 989e12 * 0.5, "bytes": 3.35e12 * 0.65}  # dense bfloat16 at half its peak; HBM3 at 0.65
FORWARD, BACKWARD, PERTURB = 5, 9, 4
CUTS = ["conv2_block3_out", "conv3_block4_out"]  # those of recipes/rxrx1.py
SCREENS = {
    "ImageNet, MLPerf's (check)": (224, 3, 1000, 1_281_167),
    "RxRx1-WILDS, train: site 1": (256, 3, 1139, 40_612),
    "RxRx1, 33 experiments, both sites": (512, 6, 1108, 81_224),
}


def values(model):
    """Elements that the convolutions of a model write, for one image."""
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    return sum(math.prod(layer.output.shape[1:]) for layer in convolutions)


def seconds(model):
    """GPU seconds of one image in training: plainly, and by ABRA."""
    flops = 6 * multiply_adds(model)
    first, *rest = model.backbone_parts
    behind = sum(values(part) for part in rest)
    stage = math.prod(first.output.shape[1:])
    moved = 2 * (values(first) + behind) * (FORWARD + BACKWARD)
    extra = 2 * (behind * (FORWARD + BACKWARD) + stage * PERTURB)
    plain = max(flops / H100["flops"], moved / H100["bytes"])
    abra = max(flops * step_cost(model) / H100["flops"], (moved + extra) / H100["bytes"])
    return plain, abra


def main():
    print(
        "| screen | image | GFLOP an image, ERM | ABRA / ERM, FLOPs | time | images/s, ERM | ABRA | read, MB/s |",
        end="",
    )
    print(" 90 epochs of ABRA, 1 H100 | 8 H100 |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, (size, channels, classes, count) in SCREENS.items():
        backbone = keras.applications.ResNet50(include_top=False, weights=None, input_shape=(size, size, channels))
        model = ABRAModel(backbone, classes, CUTS)
        plain, abra = seconds(model)
        hours = 90 * count * abra / 3600
        print(
            f"| {name} | {size} x {size} x {channels} | {6 * multiply_adds(model) / 1e9:.0f} | {step_cost(model):.2f} "
            f"| {abra / plain:.2f} | {1 / plain:,.0f} | {1 / abra:,.0f} | {size * size * channels / abra / 1e6:,.0f} "
            f"| {hours:.1f} h | {60 * hours / 8:.0f} min |"
        )


if __name__ == "__main__":
    main()
