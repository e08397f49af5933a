"""The names and declarations of the architecture in a Keras file, checked before Keras builds it.

A config is a tree of objects, each with a `class_name` that Keras looks up in its own modules, so that a file chooses
the functions of Keras to run and their arguments. `checked` accepts those in `ALLOWED`: layers, operations,
initializers and the like that only compute, each at its one address. The module that a file names is never followed.
`building` bounds what the layers then allocate by the weights that the file really has.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod

from convscope import limits
from convscope.errors import ModelError, option
from convscope.networks.foreign import KerasLayer, KerasModel
from convscope.networks.formats.keras.lambdas import is_application
from convscope.reading import is_deeper
from convscope.schema import Json

_LAYERS = """
    Activation ActivityRegularization AdaptiveAveragePooling1D AdaptiveAveragePooling2D AdaptiveAveragePooling3D
    AdaptiveMaxPooling1D AdaptiveMaxPooling2D AdaptiveMaxPooling3D Add AdditiveAttention AlphaDropout Attention AugMix
    AutoContrast Average AveragePooling1D AveragePooling2D AveragePooling3D AvgPool1D AvgPool2D AvgPool3D
    BatchNormalization Bidirectional CategoryEncoding CenterCrop Concatenate
    ContrastLimitedAdaptiveHistogramEqualization Conv1D Conv1DTranspose Conv2D Conv2DTranspose Conv3D Conv3DTranspose
    ConvLSTM1D ConvLSTM2D ConvLSTM3D Convolution1D Convolution1DTranspose Convolution2D Convolution2DTranspose
    Convolution3D Convolution3DTranspose Cropping1D Cropping2D Cropping3D CutMix Dense DepthwiseConv1D DepthwiseConv2D
    Discretization Dot Dropout ELU EinsumDense Embedding Equalization Flatten GRU GRUCell GaussianDropout GaussianNoise
    GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D GlobalAvgPool1D GlobalAvgPool2D
    GlobalAvgPool3D GlobalMaxPool1D GlobalMaxPool2D GlobalMaxPool3D GlobalMaxPooling1D GlobalMaxPooling2D
    GlobalMaxPooling3D GroupNormalization GroupQueryAttention HashedCrossing Hashing Identity InputLayer InputSpec LSTM
    LSTMCell LayerNormalization LeakyReLU Masking MaxNumBoundingBoxes MaxPool1D MaxPool2D MaxPool3D MaxPooling1D
    MaxPooling2D MaxPooling3D Maximum Minimum MixUp MultiHeadAttention Multiply Normalization PReLU Permute Pipeline
    RMSNormalization RNN RandAugment RandomBrightness RandomColorDegeneration RandomColorJitter RandomContrast
    RandomCrop RandomElasticTransform RandomErasing RandomFlip RandomGaussianBlur RandomGrayscale RandomHue
    RandomInvert RandomPerspective RandomPosterization RandomRotation RandomSaturation RandomSharpness RandomShear
    RandomTranslation RandomZoom ReLU RepeatVector Rescaling Reshape Resizing ReversibleEmbedding SeparableConv1D
    SeparableConv2D SeparableConvolution1D SeparableConvolution2D SimpleRNN SimpleRNNCell Softmax Solarization
    SpatialDropout1D SpatialDropout2D SpatialDropout3D SpectralNormalization StackedRNNCells Subtract TimeDistributed
    UnitNormalization UpSampling1D UpSampling2D UpSampling3D ZeroPadding1D ZeroPadding2D ZeroPadding3D
"""
_NUMPY = """
    Abs Absolute Add All Amax Amin Angle Any Append Arange Arccos Arccosh Arcsin Arcsinh Arctan Arctan2 Arctanh Argmax
    Argmin Argpartition Argsort Array ArraySplit Average Bincount BitwiseAnd BitwiseInvert BitwiseLeftShift BitwiseNot
    BitwiseOr BitwiseRightShift BitwiseXor BroadcastTo Cbrt Ceil Clip Concatenate Conj Conjugate Copy Corrcoef
    Correlate Cos Cosh CountNonzero Cross Cumprod Cumsum Deg2rad Diag Diagflat Diagonal Diff Digitize Divide
    DivideNoNan Dot Dsplit Dstack Einsum EmptyLike Equal Exp Exp2 ExpandDims Expm1 Fabs Flip Fliplr Flipud Floor
    FloorDivide Fmax Fmin Fmod FullLike GetItem Greater GreaterEqual Heaviside Histogram Hsplit Hstack Hypot Imag Inner
    IsIn Isclose Isfinite Isinf Isnan Isneginf Isposinf Isreal Kron LeftShift Less LessEqual Linspace Log Log10 Log1p
    Log2 Logaddexp Logaddexp2 LogicalAnd LogicalNot LogicalOr LogicalXor Logspace Matmul Max Maximum Mean Median
    Meshgrid Min Minimum Mod Moveaxis Multiply NanToNum Nanmax Nanmean Nanmin Nanstd Nansum Nanvar Ndim Negative
    Nonzero NotEqual OnesLike Outer Pad Percentile Power Prod Ptp Quantile Rad2deg Ravel Real Reciprocal Repeat Reshape
    RightShift Roll Rot90 Round SearchSorted Select Sign Signbit Sin Sinc Sinh Size Sort Split Sqrt Square Squeeze
    Stack Std Subtract Sum Swapaxes Take TakeAlongAxis Tan Tanh Tensordot Tile Trace Transpose Trapezoid Tril Triu
    TrueDivide Trunc Unique Var Vdot Vsplit Vstack Where ZerosLike
"""
_NN = """
    AdaptiveAveragePool AdaptiveMaxPool AveragePool BatchNorm Celu Conv ConvTranspose DepthToSpace DepthwiseConv
    DotProductAttention Elu Fold Gelu Glu HardShrink HardSigmoid HardSilu HardTanh LayerNorm LeakyRelu LogSigmoid
    LogSoftmax MaxPool Moments MultiHot Normalize OneHot RMSNorm Relu Relu6 Selu SeparableConv Sigmoid Silu SoftShrink
    Softmax Softplus Softsign SpaceToDepth SparsePlus SparseSigmoid Sparsemax Squareplus TanhShrink Threshold Unfold
"""

# Where Keras keeps a kind of thing, and the names there that only compute. Not in it are layers that hold code or run
# another framework's (TFSMLayer, TorchModuleWrapper, JaxLayer, FlaxLayer; a Lambda where it is not `is_harmless`),
# layers that read word lists from files (StringLookup, IntegerLookup, TextVectorization, FeatureSpace), operations that
# call functions or loop (Map, Cond, WhileLoop, ...), and everything else that Keras exports (keras.utils, keras.saving,
# ...).
ALLOWED: dict[str, frozenset[str]] = {
    module: frozenset(names.split())
    for module, names in {
        "keras": "Sequential Functional Model DTypePolicy FloatDTypePolicy SeedGenerator",
        "keras.layers": _LAYERS,
        "keras.initializers": "Constant GlorotNormal GlorotUniform HeNormal HeUniform Identity IdentityInitializer "
        "LecunNormal LecunUniform Ones Orthogonal OrthogonalInitializer RandomNormal RandomUniform TruncatedNormal "
        "VarianceScaling Zeros",
        "keras.regularizers": "L1 L1L2 L2 OrthogonalRegularizer",
        "keras.constraints": "MaxNorm MinMaxNorm NonNeg UnitNorm",
        "keras.dtype_policies": "DTypePolicy DTypePolicyMap FloatDTypePolicy QuantizedDTypePolicy "
        "QuantizedFloat8DTypePolicy Int4DTypePolicy",
        "keras.quantizers": "AbsMaxQuantizer Int8QuantizationConfig Int4QuantizationConfig Float8QuantizationConfig",
        "keras.random": "SeedGenerator",
        "keras.src.ops.numpy": _NUMPY,
        "keras.src.ops.nn": _NN,
        "keras.src.ops.math": "Erf Erfc Erfinv FFT FFT2 IFFT2 IRFFT InTopK Logsumexp RFFT Rsqrt SegmentMax SegmentSum "
        "TopK ViewAsComplex ViewAsReal",
        "keras.src.ops.image": "AffineTransform CropImages ExtractPatches GaussianBlur HSVToRGB MapCoordinates "
        "PadImages PerspectiveTransform RGBToGrayscale RGBToHSV Resize ScaleAndTranslate SobelEdges",
        "keras.src.ops.linalg": "Cholesky Det Eigh Inv Norm Pinv Qr SVD Solve SolveTriangular",
        "keras.src.ops.core": "Cast ConvertToTensor SaturateCast Scatter ScatterUpdate Slice SliceUpdate StopGradient "
        "Unstack",
        "keras.src.ops.einops": "Rearrange",
    }.items()
}
# Paths inside of Keras by which files name the same things. The first that a module begins with counts.
_KNOWN_AS = (
    *((module, module) for module in ALLOWED if module.startswith("keras.src.")),
    ("keras.src.initializers", "keras.initializers"),
    ("keras.src.regularizers", "keras.regularizers"),
    ("keras.src.constraints", "keras.constraints"),
    ("keras.src.dtype_policies", "keras.dtype_policies"),
    ("keras.src.quantizers", "keras.quantizers"),
    ("keras.src.random", "keras.random"),
    ("keras.src.layers", "keras.layers"),
    ("keras.src.models", "keras"),
    ("keras.models", "keras"),
    *((module, module) for module in ALLOWED if module.count(".") == 1),
    ("keras", "keras"),
)
_ANYWHERE = frozenset().union(*(names for module, names in ALLOWED.items() if not module.startswith("keras.src.")))
_FUNCTIONS = """
    celu elu exponential gelu glu hard_shrink hard_sigmoid hard_silu hard_swish hard_tanh leaky_relu linear
    log_sigmoid log_softmax mish relu relu6 selu sigmoid silu soft_shrink softmax softplus softsign sparse_plus
    sparse_sigmoid sparsemax squareplus swish tanh tanh_shrink threshold
"""
_DTYPES = """
    bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 bfloat16 float16 float32 float64 complex64 complex128
    float8_e4m3fn float8_e5m2
"""
_LARGEST_BATCH = 2**16


def parse(text: str, name: str) -> Json:
    """JSON of a config, no deeper than the limits.

    Raises:
        ModelError: it is none, or nested too deep.
    """
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{name}: expected a config in JSON, found something else. The file is damaged.",
            code="file-damaged",
            path=name,
        ) from error
    check_depth(config, name)
    return config


def check_depth(config: object, name: str) -> None:
    """Refuse nesting that would end in a RecursionError somewhere.

    Raises:
        ModelError: the config is deeper than the limit.
    """
    if is_deeper(config, limits.current().depth):
        raise ModelError(
            f"{name}: expected a config as Keras writes it, found one nested too deep "
            f"({limits.how_to_raise('depth')}).",
            code="input-too-large",
            limit="depth",
        )


def checked(config: object, registered: Callable[[object], str | None], name: str) -> Json:
    """The config with each object at the one address that it may have, and without what compiling needs.

    Args:
        config: as `parse` gives it.
        registered: the key of a class or function that the user registered, or None.
        name: of the file, for messages.

    Raises:
        ModelError: it names something that neither `ALLOWED` lists nor the user registered.
    """
    unknown: dict[str, None] = {}
    for node in _nodes(config):
        _check_input(node, name)
        _check_calls(node, name)
    config = _walked(config, registered, unknown)
    if unknown:
        shown = ", ".join(list(unknown)[:4])
        raise ModelError(
            f"{name}: expected only layers of Keras that only compute, found {shown}. Register your own classes first "
            "(keras.saving.register_keras_serializable), or, if you trust the file, give "
            f"{option('trust=True')}: Keras then loads every class that the file names.",
            code="needs-trust",
            path=name,
            names=list(unknown),
        )
    return config


def _nodes(item: object) -> Iterator[dict[str, Json]]:
    """Every object in a config."""
    if isinstance(item, dict) and "class_name" in item:
        yield item
    if isinstance(item, dict | list):
        for child in item.values() if isinstance(item, dict) else item:
            yield from _nodes(child)


def _walked(item: object, registered: Callable[[object], str | None], unknown: dict[str, None]) -> object:
    if isinstance(item, list):
        return [_walked(child, registered, unknown) for child in item]
    if not isinstance(item, dict):
        return item
    found = {
        key: _walked(child, registered, unknown)
        for key, child in item.items()
        if not (key == "compile_config" and "class_name" in item)
    }
    return _addressed(found, registered, unknown) if "class_name" in found else found


def _addressed(node: dict[str, object], registered: Callable, unknown: dict[str, None]) -> dict[str, object]:
    name, module = node["class_name"], node.get("module")
    if name == "function":
        return _function(node, registered, unknown)
    if isinstance(name, str) and name in _MARKS:
        if not _MARKS[name](node.get("config")):
            unknown[f"a value of the kind {name!r} that can't be read"] = None
        return {key: value for key, value in node.items() if key not in ("module", "registered_name")}
    if name == "Lambda" and is_harmless(node.get("config"), registered):
        return {**node, "module": "keras.layers", "registered_name": None}
    place, full = _home(module, name), node.get("registered_name")
    if place is not None and (full in (None, name) or registered(full) is None):
        return {**node, "registered_name": None, **({"module": place} if module else {})}
    own = registered(full) or registered(name)
    if own is None:
        unknown[f"{name!r}" + (f" of {module}" if module else "")] = None
        return node
    return {**node, "module": None, "class_name": own, "registered_name": own}


def _home(module: object, name: object) -> str | None:
    """Where a class lives that a file may name; "" for one that is named without a module, None for no such class."""
    if not isinstance(name, str) or not isinstance(module, str | None):
        return None
    if not module:
        return "" if name in _ANYWHERE else None
    known = next((place for start, place in _KNOWN_AS if module == start or module.startswith(start + ".")), None)
    if known is None or name not in ALLOWED[known]:
        return None
    if name == "Functional":
        return "keras.src.models.functional"
    return "keras.random" if name == "SeedGenerator" else known


def _function(node: dict[str, object], registered: Callable, unknown: dict[str, None]) -> dict[str, Json]:
    """A function is an activation, one of `keras.applications`, or one that the user registered."""
    name = node.get("config")
    if is_application(node):
        return node
    own = registered(name) or registered(node.get("registered_name"))
    if own is None and (not isinstance(name, str) or name not in _FUNCTIONS.split()):
        unknown[f"the function {name!r}"] = None
    key = name if own is None else own
    return {"class_name": "function", "config": key, "module": "builtins", "registered_name": key}


def is_harmless(config: object, registered: Callable[[object], str | None]) -> bool:
    """True for the config of a `Lambda` that holds no code: it calls a known function, with plain arguments."""
    if not isinstance(config, dict):
        return False
    function, unknown = config.get("function"), dict[str, None]()
    if not isinstance(function, dict) or function.get("class_name") != "function":
        return False
    _function(function, registered, unknown)
    others = [value for key, value in config.items() if key not in ("function", "dtype")]
    return not unknown and not any(True for _ in _nodes(others))


def _is_values(config: object) -> bool:
    return isinstance(config, dict) and config.get("dtype") in _DTYPES.split()


# Values that Keras writes as objects, each with what its config has to be.
_MARKS: dict[str, Callable[[object], bool]] = {
    "__keras_tensor__": lambda config: isinstance(config, dict),
    "__tensor__": _is_values,
    "__numpy__": _is_values,
    "__ellipsis__": lambda config: True,
    "__slice__": lambda config: isinstance(config, dict),
}


def _check_input(node: dict[str, object], name: str) -> None:
    """Refuse an input that declares more than an image could have."""
    config = node.get("config")
    shape = config.get("batch_shape") or config.get("batch_input_shape") if isinstance(config, dict) else None
    if not isinstance(shape, list) or not all(isinstance(size, int | None) for size in shape):
        return
    sizes = [size or 1 for size in shape]
    if prod(sizes) > 4 * limits.current().pixels or (sizes or [1])[0] > _LARGEST_BATCH:
        raise ModelError(
            f"{name}: expected an input for images, found one of the shape {tuple(shape)} "
            f"({limits.how_to_raise('pixels')}).",
            code="input-too-large",
            limit="pixels",
        )


def _check_calls(node: dict[str, object], name: str) -> None:
    """Refuse calls that take constants alone: Keras would compute them while it builds, whatever their size."""
    calls = node.get("inbound_nodes")
    for call in calls if isinstance(calls, list) else ():
        if isinstance(call, dict) and not _takes_tensor([call.get("args"), call.get("kwargs")]):
            raise ModelError(
                f"{name}: expected every call of a layer to depend on the image, found one with constants alone. "
                "Store its result as a weight, and save the model again.",
                code="call-of-constants",
                path=name,
            )


def _takes_tensor(item: object) -> bool:
    """True if a tensor of the graph is among what Keras looks through for one: plain lists and dicts."""
    if isinstance(item, dict) and "class_name" in item:
        return item["class_name"] == "__keras_tensor__"
    if isinstance(item, dict | list):
        return any(_takes_tensor(child) for child in (item.values() if isinstance(item, dict) else item))
    return False


# -- limits of allocation ---------------------------------------------------------------------------------

_BUILDING = threading.RLock()
_SPARE = 2**24  # numbers that are in no file: states of layers, and a reserve for the message on missing weights


@contextmanager
def building(stored: int, name: str) -> Iterator[None]:
    """Let Keras build a model whose variables together are not much larger than those in its file.

    Args:
        stored: numbers in the file.
        name: of the file, for messages.

    Raises:
        ModelError: a layer declares more, before it is allocated, or an output inside larger than the limits.
    """
    import keras

    allowed, limit = min(2 * stored + _SPARE, limits.current().weights // 4), limits.current()
    taken = made = 0
    refused: list[ModelError] = []  # Keras puts errors into others of its own, or goes on without

    def refuse(error: ModelError) -> None:
        refused.append(error)
        raise MemoryError(str(error))

    def variable(initializer: object, shape: object = None, *_: object, **__: object) -> None:
        nonlocal taken
        taken += 0 if shape is None else _elements(shape)
        if taken > allowed:
            refuse(
                ModelError(
                    f"{name}: expected an architecture as large as its weights, found layers that declare more than "
                    f"{allowed:,} numbers where the file holds {stored:,}.",
                    code="architecture-too-large",
                    path=name,
                    expected=stored,
                    found=taken,
                )
            )

    def tensor(shape: object, *_: object, **__: object) -> None:
        nonlocal made
        made += 1
        if made > limit.nodes:
            refuse(
                ModelError(
                    f"{name}: expected a network, found one of more than {limit.nodes} outputs inside "
                    f"({limits.how_to_raise('nodes')}).",
                    code="input-too-large",
                    path=name,
                    limit="nodes",
                )
            )
        if 4 * _elements(shape) > limit.values:
            refuse(_too_large_inside(name, shape))

    with _BUILDING, _before(keras.Variable, variable), _before(keras.KerasTensor, tensor):
        try:
            yield
        except RecursionError as error:
            raise ModelError(
                f"{name}: expected a config as Keras writes it, found one nested too deep.",
                code="input-too-large",
                path=name,
                limit="depth",
            ) from error
        except Exception as error:
            raise (refused[0] if refused else error) from error
        if refused:
            raise refused[0]


@contextmanager
def _before(cls: type, check: Callable[..., None]) -> Iterator[None]:
    """Let `check` inspect the arguments of a class, in this thread, before it is made."""
    plain, own, here = cls.__init__, "__init__" in vars(cls), threading.get_ident()  # type: ignore[misc]

    def checked_first(self: object, *args: object, **options: object) -> None:
        if threading.get_ident() == here:
            check(*args, **options)
        plain(self, *args, **options)

    cls.__init__ = checked_first  # type: ignore[misc]
    try:
        yield
    finally:
        if own:
            cls.__init__ = plain  # type: ignore[misc]
        else:
            del cls.__init__  # type: ignore[misc]


def _too_large_inside(name: str, shape: Json) -> ModelError:
    return ModelError(
        f"{name}: expected outputs that fit the memory, found one of the shape {tuple(shape)} for one image "
        f"({limits.how_to_raise('values')}).",
        code="input-too-large",
        path=name,
        limit="values",
        shape=list(shape),
    )


def check_outputs(model: KerasModel, name: str) -> None:
    """Refuse a model whose outputs inside no memory holds, before it is run: sizes that it leaves open count 1.

    Raises:
        ModelError: an operation's output for one image is larger than the limit, or all are than 16 times that.
    """
    total, most = 0, limits.current().values
    for operation in _operations(model):
        tensors = [tensor for node in operation._inbound_nodes for tensor in node.output_tensors]
        for shape in (tensor.shape for tensor in tensors if hasattr(tensor, "shape")):
            size = 4 * _elements(shape)
            total += size
            if size > most or total > 16 * most:
                raise _too_large_inside(name, shape)


def _operations(model: KerasModel) -> Iterator[KerasLayer]:
    """Layers and operations of a model and of those inside of it."""
    for item in [*model._flatten_layers(), model]:
        yield item
        yield from getattr(getattr(item, "_functional", None) or item, "operations", ())


def _elements(shape: Json) -> int:
    try:
        return prod(int(size or 1) for size in shape)
    except (TypeError, ValueError):  # Keras reports the fault
        return 0
