"""All migrations, in the order in which they are tried."""

from __future__ import annotations

from convscope.errors import ModelError
from convscope.networks.formats.keras.legacy_h5.migrations.arguments import (
    activation_name,
    axis_list,
    dropped_argument,
    dtype_policy,
    gru_bias,
    initializer_arguments,
    leaky_slope,
    module_path,
    renamed_class,
    tensorflow_operation,
)
from convscope.networks.formats.keras.legacy_h5.migrations.calls import (
    flat_name,
    keyword_tensor,
    nested_nodes,
    single_tensor,
)
from convscope.networks.formats.keras.legacy_h5.migrations.first_layers import (
    first_shape,
    input_shape,
    nested_names,
    sequential_list,
)
from convscope.networks.formats.keras.legacy_h5.migrations.keras_1 import (
    keras_1_arguments,
    keras_1_batch_norm,
    keras_1_class,
    keras_1_input,
    keras_1_kernel,
    keras_1_layout,
    keras_1_merge,
    keras_1_padding,
    keras_1_penalty,
)
from convscope.networks.formats.keras.legacy_h5.migrations.migration import Migration
from convscope.networks.formats.keras.legacy_h5.nodes import layers_of
from convscope.networks.formats.keras.legacy_h5.stored import Stored

# In this order: a migration may count on those before it.
MIGRATIONS: tuple[Migration, ...] = (
    Migration("module paths of tf.keras 2, such as keras.src.engine.functional (2.12 to 2.15)", module_path),
    Migration("Sequential written as a list of layers (Keras 1 to 2.2.2)", sequential_list),
    Migration("names of nested Sequentials taken from the weights (Keras 1 to 2.2.2)", nested_names),
    Migration("shape of the first layer made an InputLayer (Keras 1 to 2.3)", first_shape),
    Migration("batch_input_shape is batch_shape, or repeats the input's (Keras 1 and 2)", input_shape),
    Migration("layer classes of Keras 1", keras_1_class),
    Migration("Merge layers of Keras 1", keras_1_merge),
    Migration("input_dtype of Keras 1", keras_1_input),
    Migration("layout of padding, cropping, upsampling and flattening (Keras 1)", keras_1_layout),
    Migration("arguments of Keras 1", keras_1_arguments),
    Migration("nb_row and nb_col of Keras 1", keras_1_kernel),
    Migration("padding written as four numbers (Keras 1)", keras_1_padding),
    Migration("regularizers and constraints of Keras 1 left out: they act in training alone", keras_1_penalty),
    Migration("mode of BatchNormalization (Keras 1)", keras_1_batch_norm),
    Migration("layer classes of Keras 2", renamed_class),
    Migration("axis of BatchNormalization written as a list (tf.keras 2)", axis_list),
    Migration("mixed-precision policies (tf.keras 2)", dtype_policy),
    Migration("arguments that Keras 3 has no more and that change nothing (Keras 2)", dropped_argument),
    Migration("alpha of LeakyReLU (Keras 1 and 2)", leaky_slope),
    Migration("dtype of initializers (tf.keras 1)", initializer_arguments),
    Migration("GRU with one bias (Keras 1 to 2.1)", gru_bias),
    Migration("activations, among them the hard_sigmoid of Keras 1 and 2", activation_name),
    Migration("TensorFlow operations made Rescaling or Activation (tf.keras 2.4 to 2.15)", tensorflow_operation),
    Migration('"/" in layer names made "_" (Keras 1 and 2)', flat_name),
    Migration("calls of nested models counted from 0 (Keras 1 and 2)", nested_nodes),
    Migration("one input or output taken out of its list (Keras 1 and 2)", single_tensor),
    Migration("tensors given by keyword (tf.keras 2)", keyword_tensor),
)  # fmt: skip


# The errors of a migration in a config that no Keras wrote.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError, RecursionError)


def migrate(stored: Stored) -> list[str]:
    """Change the config in place; returns the changes.

    Raises:
        ModelError: the config is so malformed that a migration can't read it.
    """
    said = []
    try:
        for migration in MIGRATIONS:
            changed = [migration.change(layer, stored) for layer in list(layers_of(stored.config))]
            said += [migration.said] if any(changed) else []
    except MALFORMED as error:
        found = f"one that can't be read ({error!r})"
        message = f"{stored.path.name}: expected a config as Keras writes it, found {found}."
        raise ModelError(message, code="config-invalid", path=stored.path.name, reason=repr(error)) from error
    return said
