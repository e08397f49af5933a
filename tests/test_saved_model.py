"""SavedModel folders: what a legitimate one answers, and what a hostile one can't do."""

import hashlib
import os
import shutil

import numpy as np
import pytest

keras = pytest.importorskip("keras")
if keras.backend.backend() != "tensorflow":
    pytest.skip("a SavedModel runs on TensorFlow", allow_module_level=True)
import models  # noqa: E402
import tensorflow as tf  # noqa: E402
from keras import layers  # noqa: E402
from tensorflow.core.protobuf import saved_model_pb2  # noqa: E402

import convscope  # noqa: E402
from convscope import limits  # noqa: E402
from convscope.errors import ModelError  # noqa: E402
from convscope.networks.formats.saved_model import operations  # noqa: E402
from convscope.networks.formats.saved_model import program as saved_model  # noqa: E402

v1 = tf.compat.v1
IMAGE = tf.TensorSpec((None, 8, 8, 3), tf.float32, name="x")


# -- folders of many kinds -------------------------------------------------------------------------------


def of_keras(folder):
    models.plain().export(folder, verbose=False)


def of_keras_with_many_kinds(folder):
    given = keras.Input((24, 24, 3))
    x = layers.Rescaling(1 / 255)(layers.RandomFlip()(given))
    x = layers.Conv2D(8, 3, strides=2, padding="same", activation="swish")(x)
    x = layers.DepthwiseConv2D(3)(layers.BatchNormalization()(x))
    x = layers.Resizing(8, 8)(layers.PReLU()(layers.Dropout(0.2)(x)))
    x = layers.Multiply()([x, layers.Dense(8, "sigmoid")(layers.GlobalAveragePooling2D(keepdims=True)(x))])
    x = layers.Conv2DTranspose(4, 3)(layers.UpSampling2D()(layers.LayerNormalization()(x)))
    model = models.seeded(keras.Model(given, layers.Dense(4, "softmax")(layers.GlobalMaxPooling2D()(x))))
    model.export(folder, verbose=False)


class Module(tf.Module):
    """Functions that call functions, a variable used twice, a branch."""

    def __init__(self, name=None):
        super().__init__(name)
        rng = np.random.default_rng(0)
        self.kernel = tf.Variable(rng.normal(size=(3, 3, 3, 4)).astype("float32"), name="kernel")
        self.table = tf.Variable(rng.normal(size=(5, 4)).astype("float32"), name="table")
        self.inner = tf.function(self._inner)

    def _inner(self, x):
        return tf.nn.relu(x) + self.kernel[0, 0, 0]

    @tf.function(input_signature=[IMAGE])
    def serve(self, x):
        """(n, 8, 8, 3) to (n, 4)."""
        y = self.inner(self.inner(tf.nn.conv2d(x, self.kernel, 1, "SAME")))
        y = tf.cond(tf.reduce_sum(x) > 0, lambda: y * 2.0, lambda: y)
        return tf.reduce_mean(y, (1, 2)) + tf.gather(self.table, [1])


def of_a_module(folder):
    made = Module()
    tf.saved_model.save(made, str(folder), signatures={"serving_default": made.serve})


def of_bytes(folder):
    """Takes uint8, and gives two outputs."""

    @tf.function(input_signature=[tf.TensorSpec((None, None, None, 3), tf.uint8)])
    def serve(image):
        y = tf.image.resize(tf.cast(image, tf.float32), (4, 4))
        return {"mean": tf.reduce_mean(y, (1, 2)), "top": tf.reduce_max(y, (1, 2))}

    made = tf.Module()
    made.serve = serve
    tf.saved_model.save(made, str(folder), signatures=serve)


def of_version_1(folder, resource=True, **options):
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, (None, 8, 8, 3), name="x")
        training = v1.placeholder_with_default(False, [])
        rng = np.random.default_rng(0)
        kernel = v1.get_variable("kernel", initializer=rng.normal(size=(3, 3, 3, 4)).astype("f"), use_resource=resource)
        step = v1.get_variable("step", initializer=np.int64(7), use_resource=resource)
        y = tf.nn.conv2d(x, kernel, 1, "SAME") * tf.cast(step, tf.float32)
        y = v1.cond(training, lambda: tf.nn.dropout(y, rate=0.5), lambda: y)
        session.run(v1.global_variables_initializer())
        outputs = {"y": tf.reduce_mean(y, (1, 2))}
        start = options["start"]() if "start" in options else None
        v1.saved_model.simple_save(session, str(folder), {"x": x}, outputs, legacy_init_op=start)


def of_version_1_with_references(folder):
    of_version_1(folder, resource=False)


def frozen(folder):
    """Numbers in the graph, no variables."""
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, (None, 8, 8, 3), name="x")
        kernel = tf.constant(np.random.default_rng(0).normal(size=(3, 3, 3, 4)).astype("f"))
        v1.saved_model.simple_save(session, str(folder), {"x": x}, {"y": tf.nn.conv2d(x, kernel, 1, "SAME")})


def of_keras_with_its_training(folder):
    """As `tf.saved_model.save` leaves a compiled Keras model: optimizer and metrics lie beside it."""
    model = models.plain()
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(np.zeros((2, 16, 16, 3)), np.zeros((2, 5)), verbose=0)
    tf.saved_model.save(model, str(folder))


KINDS = [
    of_keras, of_keras_with_many_kinds, of_a_module, of_bytes, of_version_1, of_version_1_with_references, frozen,
    of_keras_with_its_training,
]  # fmt: skip


def answers_of_tensorflow(folder, x):
    """The oracle: TensorFlow's own loader."""
    signature = tf.saved_model.load(str(folder)).signatures["serving_default"]
    (name,) = signature.structured_input_signature[1]
    return {key: value.numpy() for key, value in signature(**{name: tf.constant(x)}).items()}


@pytest.mark.parametrize("make", KINDS)
def test_a_legitimate_folder_answers_as_tensorflow_says(make, tmp_path):
    make(tmp_path / "saved")
    network = convscope.open_model(tmp_path / "saved", preprocess="none")
    shape, dtype = network.model.inputs[0].shape, network.model.inputs[0].dtype
    x = np.random.default_rng(1).uniform(0, 200, (2, *[size or 8 for size in shape[1:]])).astype(dtype)
    got = network.model(x, training=False)
    for name, value in answers_of_tensorflow(tmp_path / "saved", x).items():
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(got[name]), value)


def test_the_variables_are_the_weights_of_the_layer(tmp_path):
    of_a_module(tmp_path / "saved")
    network = convscope.open_model(tmp_path / "saved")
    (kernel,) = [item for item in network.model.get_weights() if item.ndim == 4]
    np.testing.assert_array_equal(kernel, Module().kernel.numpy())


def test_what_a_model_assigns_stays_as_it_was(tmp_path):
    """Its state is that of the file in each pass."""
    made = tf.Module()
    made.count = tf.Variable(2.0)

    @tf.function(input_signature=[IMAGE])
    def serve(x):
        y = tf.reduce_mean(x, (1, 2)) * made.count
        made.count.assign_add(1.0)
        return y

    made.serve = serve
    tf.saved_model.save(made, str(tmp_path / "saved"), signatures=serve)
    network = convscope.open_model(tmp_path / "saved", preprocess="none")
    for _ in range(3):
        (output,) = network.model(np.ones((1, 8, 8, 3), "float32"), training=False).values()
        np.testing.assert_allclose(output, [[2, 2, 2]], rtol=1e-6)


def test_two_folders_do_not_mix_their_functions(tmp_path):
    """Functions are called alike in every file; here the same file has other numbers."""
    x = np.random.default_rng(1).normal(size=(1, 8, 8, 3)).astype("float32")
    wanted, got = [], []
    for scale in (1.0, 3.0):
        made = tf.Module()
        made.serve = tf.function(lambda x, scale=scale: tf.reduce_mean(x, (1, 2)) * scale, input_signature=[IMAGE])
        tf.saved_model.save(made, str(tmp_path / f"{scale}"), signatures=made.serve)
        got.append(convscope.open_model(tmp_path / f"{scale}", preprocess="none"))
        wanted.append(x.mean((1, 2)) * scale)
    for network, value in zip(got, wanted, strict=True):
        (output,) = network.model(x, training=False).values()
        np.testing.assert_allclose(output, value, rtol=1e-5, atol=1e-6)


# -- what a hostile folder can't do ----------------------------------------------------------------------


def changed(folder, change):
    """A SavedModel with its graph changed."""
    file = folder / "saved_model.pb"
    model = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    change(model.meta_graphs[0])
    file.write_bytes(model.SerializeToString())
    return folder


def writing(nodes, marker, name="evil"):
    """Add nodes that write a file."""
    for part, text in (("name", str(marker)), ("text", "written")):
        constant = nodes.add(name=f"{name}/{part}", op="Const")
        constant.attr["dtype"].type = tf.string.as_datatype_enum
        constant.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(text))
    return nodes.add(name=name, op="WriteFile", input=[f"{name}/name", f"{name}/text"])


def as_restore(meta, marker):
    meta.saver_def.restore_op_name = writing(meta.graph_def.node, marker).name


def as_save(meta, marker):
    meta.saver_def.save_tensor_name = writing(meta.graph_def.node, marker).name + ":0"


def behind_the_restore(meta, marker):
    """What is named as the restore operation is a NoOp; what it waits for writes."""
    writing(meta.graph_def.node, marker)
    meta.graph_def.node.add(name="restore_it", op="NoOp", input=["^evil"])
    meta.saver_def.restore_op_name = "restore_it"


def as_start(meta, marker):
    writing(meta.graph_def.node, marker)
    for key in ("saved_model_main_op", "legacy_init_op", "saved_model_init_op"):
        meta.collection_def[key].node_list.value.append("evil")
    meta.signature_def["__saved_model_init_op"].outputs["__saved_model_init_op"].name = "evil"


def in_a_function_of_the_saver(meta, marker):
    function = next(item for item in meta.graph_def.library.function if "restore" in item.signature.name)
    for node in list(writing_in_function(marker)):
        function.node_def.add().CopyFrom(node)
    function.control_ret["evil"] = "evil"


def in_the_signature(meta, marker):
    function = next(item for item in meta.graph_def.library.function if "signature" in item.signature.name)
    for node in list(writing_in_function(marker)):
        function.node_def.add().CopyFrom(node)
    function.control_ret["evil"] = "evil"


def writing_in_function(marker):
    holder = v1.GraphDef()
    writing(holder.node, marker)
    holder.node[2].input[:] = ["evil/name:output:0", "evil/text:output:0"]
    return holder.node


def behind_an_output(meta, marker):
    writing(meta.graph_def.node, marker)
    signature = meta.signature_def["serving_default"]
    for output in signature.outputs.values():
        next(node for node in meta.graph_def.node if node.name == output.name.split(":")[0]).input.append("^evil")


def in_an_attribute_of_an_attribute(meta, marker):
    """A function named inside of the attributes of a function's name."""
    function = meta.graph_def.library.function.add()
    function.signature.name = "evil_function"
    function.node_def.extend(writing_in_function(marker))
    for node in meta.graph_def.node:
        if node.op == "StatefulPartitionedCall":
            node.attr["f"].func.attr["hidden"].func.name = "evil_function"


def as_a_gradient(meta, marker):
    function = meta.graph_def.library.function.add()
    function.signature.name = "evil_function"
    function.node_def.extend(writing_in_function(marker))
    meta.graph_def.library.gradient.add(function_name="x", gradient_func="evil_function")


HIDING = [
    as_restore, as_save, behind_the_restore, as_start, in_a_function_of_the_saver, in_the_signature, behind_an_output,
    in_an_attribute_of_an_attribute, as_a_gradient,
]  # fmt: skip


@pytest.mark.parametrize("make", [of_a_module, of_version_1, of_keras])
@pytest.mark.parametrize("hide", HIDING)
def test_writing_is_refused_wherever_it_hides(make, hide, tmp_path):
    marker = tmp_path / "was-run"
    make(tmp_path / "saved")
    if make is of_version_1 and hide in (in_a_function_of_the_saver, in_the_signature):
        pytest.skip("it has no functions")
    changed(tmp_path / "saved", lambda meta: hide(meta, marker))
    with pytest.raises(ModelError, match=r"WriteFile.*trust=True"):
        convscope.open_model(tmp_path / "saved")
    assert not marker.exists()


OPERATIONS = [
    "ReadFile", "MatchingFiles", "PyFunc", "PyFuncStateless", "EagerPyFunc", "HashTableV2",
    "InitializeTableFromTextFileV2", "LookupTableFindV2", "ImmutableConst", "PrintV2", "Print", "DebugIdentityV2",
    "DecodeWav", "TensorDataset", "IteratorV2", "QueueEnqueueV2", "WholeFileReaderV2", "SummaryWriter",
    "CreateSummaryFileWriter", "XlaLaunch", "RemoteCall", "CollectiveReduceV2", "Send", "Recv",
    "ConfigureDistributedTPU", "OwnOperation", "Abort", "GenerateVocabRemapping", "LoadAndRemapMatrix",
    "ExecuteTPUEmbeddingPartitioner",
]  # fmt: skip


@pytest.mark.parametrize("op", OPERATIONS)
def test_what_is_not_listed_is_refused_in_whatever_place(op, tmp_path):
    of_a_module(tmp_path / "saved")
    changed(tmp_path / "saved", lambda meta: meta.graph_def.node.add(name="evil", op=op))
    with pytest.raises(ModelError, match=rf"{op}\).*trust=True"):
        convscope.open_model(tmp_path / "saved")


def test_the_lists_know_no_operation_that_reaches_out():
    """By words in the names of TensorFlow's operations; what is left is named here, and never run."""
    words = ("File", "Py", "Print", "Save", "Restore", "Table", "Dataset", "Iterator", "Queue", "Reader", "Summary")
    words += ("Debug", "Remote", "Rpc", "Collective", "TPU", "Xla", "Send", "Recv", "Barrier", "Socket", "Decode")
    found = {op for op in operations.RUNNING | operations.VARIABLES if any(word in op for word in words)}
    assert not found
    idle = {op for op in operations.IDLE if any(word in op for word in words)}
    assert idle == {
        *("SaveV2", "SaveSlices", "Save", "RestoreV2", "RestoreSlice", "Restore", "ShardedFilename", "ShardedFilespec")
    }


@pytest.mark.parametrize("op", ["SaveV2", "RestoreV2", "MergeV2Checkpoints", "While", "Assign"])
def test_what_saves_or_loops_is_not_run(op, tmp_path):
    """It may lie in a file, as in each; the signature may not need it."""
    of_a_module(tmp_path / "saved")

    def change(meta):
        meta.graph_def.node.add(name="evil", op=op)
        behind = next(node for node in meta.graph_def.node if node.op == "StatefulPartitionedCall")
        behind.input.append("^evil")

    changed(tmp_path / "saved", change)
    with pytest.raises(ModelError, match=rf"{op}\).*trust=True"):
        convscope.open_model(tmp_path / "saved")


def test_objects_of_the_file_are_not_revived(tmp_path):
    """TensorFlow's loader would call what the object graph says; here it plays no part."""
    of_a_module(tmp_path / "saved")

    def change(meta):
        nodes = meta.object_graph_def.nodes
        made = nodes.add()
        made.user_object.identifier = "_generic_user_object"
        made.children.add(node_id=10**6, local_name="nowhere")
        nodes[0].children.add(node_id=len(nodes) - 1, local_name="lost")
        nodes[0].slot_variables.add(original_variable_node_id=10**6, slot_name="m", slot_variable_node_id=10**6 + 1)

    changed(tmp_path / "saved", change)
    with pytest.raises(Exception, match=r".+"):
        tf.saved_model.load(str(tmp_path / "saved"))
    module = Module()  # its functions refer to it weakly
    for trust in (False, True):
        network = convscope.open_model(tmp_path / "saved", preprocess="none", trust=trust)
        x = np.random.default_rng(1).normal(size=(1, 8, 8, 3)).astype("float32")
        (output,) = network.model(x, training=False).values()
        np.testing.assert_allclose(output, module.serve(x), rtol=1e-6)


def test_a_layer_that_needs_trust_opens_with_it(tmp_path):
    made = tf.Module()
    made.table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(tf.constant([0, 1], tf.int64), tf.constant([2.0, 3.0])), 0.0
    )
    function = tf.function(
        lambda x: tf.reduce_mean(x, (1, 2)) * made.table.lookup(tf.constant(1, tf.int64)), input_signature=[IMAGE]
    )
    made.serve = function
    tf.saved_model.save(made, str(tmp_path / "saved"), signatures=function)
    with pytest.raises(ModelError, match=r"HashTableV2.*trust=True"):
        convscope.open_model(tmp_path / "saved")
    network = convscope.open_model(tmp_path / "saved", trust=True, preprocess="none")
    (output,) = network.model(np.ones((1, 8, 8, 3), "float32"), training=False).values()
    np.testing.assert_allclose(output, [[3, 3, 3]], rtol=1e-6)


# -- sizes, and files that are none ----------------------------------------------------------------------


def test_constants_that_one_number_fills(tmp_path):
    of_a_module(tmp_path / "saved")

    def change(meta):
        for function in meta.graph_def.library.function:
            for node in function.node_def:
                if node.op == "Const" and "restore" not in function.signature.name:
                    tensor = node.attr["value"].tensor
                    del tensor.tensor_shape.dim[:]
                    tensor.tensor_shape.dim.add(size=2**33)

    changed(tmp_path / "saved", change)
    with pytest.raises(ModelError, match="a constant of the shape"):
        convscope.open_model(tmp_path / "saved")


@pytest.mark.parametrize("itself", [True, False])
def test_functions_that_call_each_other(itself, tmp_path):
    """2^26 operations in 26 functions, or a function without end."""
    of_a_module(tmp_path / "saved")

    def change(meta):
        library = meta.graph_def.library.function
        first = next(item for item in library if "signature" in item.signature.name)
        for number in range(26):
            made = library.add()
            made.signature.name = f"level{number}"
            for side in "ab":
                call = made.node_def.add(name=side, op="PartitionedCall")
                call.attr["f"].func.name = f"level{number + 1}" if number < 25 else ("level0" if itself else "end")
        library.add().signature.name = "end"
        call = first.node_def.add(name="calls", op="PartitionedCall")
        call.attr["f"].func.name = "level0"

    changed(tmp_path / "saved", change)
    with pytest.raises(ModelError, match="call themselves" if itself else "too many operations"):
        convscope.open_model(tmp_path / "saved")


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("which", ["saved_model.pb", "variables/variables.index"])
def test_pipes_and_devices_are_not_waited_for(which, trust, tmp_path):
    of_a_module(tmp_path / "saved")
    (tmp_path / "saved" / which).unlink()
    os.mkfifo(tmp_path / "saved" / which)
    with pytest.raises(ModelError, match=r"device, a pipe|can't be read"):
        convscope.open_model(tmp_path / "saved", trust=trust)


def linked(folder):
    """As in the cache of a hub: each file is a link to its content, which lies elsewhere."""
    of_a_module(folder)
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for path in list(folder.rglob("*.*")):
        if path.is_file():
            shutil.move(path, blobs / path.name)
            path.symlink_to(blobs / path.name)


def test_links_out_of_the_folder_are_followed_with_trust_alone(tmp_path):
    linked(tmp_path / "saved")
    with pytest.raises(ModelError, match=r"a link out of its folder.*cp -rL.*trust=True"):
        convscope.open_model(tmp_path / "saved")
    assert convscope.open_model(tmp_path / "saved", trust=True).layers


def test_a_folder_of_variables_that_lies_elsewhere(tmp_path):
    of_a_module(tmp_path / "saved")
    shutil.move(tmp_path / "saved" / "variables", tmp_path / "elsewhere")
    (tmp_path / "saved" / "variables").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="a link out of its folder"):
        convscope.open_model(tmp_path / "saved")


def test_links_inside_the_folder_are_followed(tmp_path):
    of_a_module(tmp_path / "saved")
    (tmp_path / "saved" / "saved_model.pb").rename(tmp_path / "saved" / "graph.pb")
    (tmp_path / "saved" / "saved_model.pb").symlink_to("graph.pb")
    (tmp_path / "link").symlink_to(tmp_path / "saved")
    assert convscope.open_model(tmp_path / "link").layers


def test_lacking_variables_are_named(tmp_path):
    of_a_module(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved" / "variables")
    with pytest.raises(ModelError, match="variables"):
        convscope.open_model(tmp_path / "saved")


def test_a_limit_on_the_size(tmp_path):
    of_a_module(tmp_path / "saved")
    with limits.using(weights=1000), pytest.raises(ModelError, match="limit weights"):
        convscope.open_model(tmp_path / "saved")


def test_damaged_folders_are_one_error_each(tmp_path):
    """Bytes drawn at random are overwritten: the model, or a ModelError."""
    of_a_module(tmp_path / "saved")
    file, rng = tmp_path / "saved" / "saved_model.pb", np.random.default_rng(0)
    content = file.read_bytes()
    for number in range(40):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 4):
            damaged[place] = rng.integers(256)
        file.write_bytes(damaged[: rng.integers(len(damaged))] if number % 5 == 0 else damaged)
        try:
            saved_model.read(tmp_path / "saved")
        except ModelError as error:
            said = str(error)
            assert "\n" not in said


# -- files that are none ---------------------------------------------------------------------------------


def _refused(folder, match):
    with pytest.raises(ModelError, match=match):
        convscope.open_model(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes have names on POSIX alone")
@pytest.mark.parametrize("name", ["saved_model.pb", "variables/variables.index", "variables/variables"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    of_a_module(tmp_path / "m")
    (tmp_path / "m" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "m" / name)
    _refused(tmp_path / "m", "a device, a pipe or a folder")


def test_a_folder_in_place_of_the_checkpoint_does_not_name_another(tmp_path):
    of_a_module(tmp_path / "m")
    inside, moved = tmp_path / "m" / "variables", tmp_path / "elsewhere"
    inside.rename(moved)
    (inside / "variables").mkdir(parents=True)
    (inside / "variables.data-00000-of-00001").write_bytes(bytes(10_000))
    (inside / "variables" / "checkpoint").write_text(f'model_checkpoint_path: "{moved / "variables"}"\n')
    _refused(tmp_path / "m", "a device, a pipe or a folder")


def test_a_spec_notices_that_the_variables_have_changed(tmp_path):
    of_keras(tmp_path / "net")
    spec = convscope.open_model(tmp_path / "net").spec
    variables = tmp_path / "net" / "variables"
    names = sorted(path.name for path in variables.iterdir())
    lines = [f"{hashlib.sha256((variables / name).read_bytes()).hexdigest()}  variables/{name}\n" for name in names]
    assert len(lines) >= 2
    assert spec.origin.beside_sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert spec.open().spec == spec
    with next(variables.glob("*.data-*")).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ModelError, match=r"a file beside .*net has changed since") as caught:
        spec.open()
    assert caught.value.code == "file-changed"
