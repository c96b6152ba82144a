"""Adam with weight decay as torch's `Adam` has it: added to the gradient, not taken from the weight."""

import keras


@keras.saving.register_keras_serializable("recipes")
class CoupledAdam(keras.optimizers.Adam):
    """Adam whose gradient of every weight w is increased by `l2 * w`."""

    def __init__(self, learning_rate=1e-3, l2=0.0, name="coupled_adam", **kwargs):
        super().__init__(learning_rate, name=name, **kwargs)
        self.l2 = l2

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient + self.l2 * keras.ops.cast(variable, gradient.dtype), variable, learning_rate)

    def get_config(self):
        return {**super().get_config(), "l2": self.l2}
