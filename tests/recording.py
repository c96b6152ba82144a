import keras


class RecordingOptimizer(keras.optimizers.SGD):
    """SGD that keeps the gradients it is given, as variables, so that compiled steps record too."""

    def __init__(self, learning_rate=0.01, **kwargs):
        super().__init__(learning_rate=learning_rate, **kwargs)

    def build(self, variables):
        super().build(variables)
        self.records = [self.add_variable_from_reference(v, name="record") for v in variables]

    def update_step(self, gradient, variable, learning_rate):
        self.assign(self.records[self._get_variable_index(variable)], gradient)
        super().update_step(gradient, variable, learning_rate)

    def recorded(self):
        """The last gradients, NumPy arrays in the order of the trainable variables."""
        return [keras.ops.convert_to_numpy(record) for record in self.records]
