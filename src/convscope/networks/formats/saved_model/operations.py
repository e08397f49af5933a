"""TensorFlow's operations, sorted by their possible effects. One that is not listed is not known to be harmless."""

from __future__ import annotations

# Of their inputs they compute their outputs, and nothing else: no file, no Python, no state, no loop.
COMPUTING = frozenset(
    """
    Abs AccumulateNV2 Acos Acosh Add AddN AddV2 AdjustContrast AdjustContrastv2 AdjustHue AdjustSaturation All Angle Any
    ApproximateEqual ArgMax ArgMin Asin Asinh Atan Atan2 Atanh AvgPool AvgPool3D AvgPool3DGrad AvgPoolGrad
    BatchMatMul BatchMatMulV2 BatchMatMulV3 BatchNormWithGlobalNormalization BatchToSpace BatchToSpaceND Betainc
    BiasAdd BiasAddGrad BiasAddV1 Bincount Bitcast BitwiseAnd BitwiseOr BitwiseXor BroadcastArgs BroadcastGradientArgs
    BroadcastTo Bucketize Cast Ceil CheckNumerics Cholesky ClipByValue CombinedNonMaxSuppression Complex ComplexAbs
    Concat ConcatOffset ConcatV2 Conj ConjugateTranspose Const ControlTrigger Conv Conv2D Conv2DBackpropFilter
    Conv2DBackpropInput Conv2DBackpropInputV2 Conv3D Conv3DBackpropInput Conv3DBackpropInputV2 Cos Cosh CropAndResize
    Cross Cumprod Cumsum CumulativeLogsumexp DataFormatDimMap DataFormatVecPermute DenseBincount DepthToSpace
    DepthwiseConv2dNative DepthwiseConv2dNativeBackpropInput Dequantize Diag DiagPart Digamma Dilation2D Div DivNoNan
    DynamicPartition DynamicStitch Einsum Elu EluGrad EnsureShape Equal Erf Erfc Erfinv EuclideanNorm Exp ExpandDims
    Expm1 ExtractGlimpse ExtractGlimpseV2 ExtractImagePatches ExtractVolumePatches FFT FFT2D FFT3D
    FakeQuantWithMinMaxArgs FakeQuantWithMinMaxVars FakeQuantWithMinMaxVarsPerChannel Fill Floor FloorDiv FloorMod
    FractionalAvgPool FractionalMaxPool FusedBatchNorm FusedBatchNormV2 FusedBatchNormV3 FusedPadConv2D
    FusedResizeAndPadConv2D Gather GatherNd GatherV2 Greater GreaterEqual HSVToRGB HistogramFixedWidth IFFT IFFT2D
    IFFT3D IRFFT IRFFT2D IRFFT3D Identity IdentityN Igamma Igammac Imag ImageProjectiveTransformV2
    ImageProjectiveTransformV3 InTopK InTopKV2 Inv Invert InvertPermutation IsFinite IsInf IsNan L2Loss LRN LeakyRelu
    LeftShift Less LessEqual Lgamma LinSpace ListDiff Log Log1p LogMatrixDeterminant LogSoftmax LogicalAnd LogicalNot
    LogicalOr LowerBound MatMul MatrixBandPart MatrixDeterminant MatrixDiag MatrixDiagPart MatrixDiagPartV2
    MatrixDiagPartV3 MatrixDiagV2 MatrixDiagV3 MatrixInverse MatrixSetDiag MatrixSetDiagV2 MatrixSetDiagV3 MatrixSolve
    MatrixSolveLs MatrixTriangularSolve Max MaxPool MaxPool3D MaxPoolV2 MaxPoolWithArgmax Maximum Mean Merge Min Minimum
    MirrorPad Mod Mul MulNoNan Neg NextAfter NoOp NonMaxSuppression NonMaxSuppressionV2 NonMaxSuppressionV3
    NonMaxSuppressionV4 NonMaxSuppressionV5 NotEqual NthElement OneHot OnesLike Pack Pad PadV2 ParallelConcat
    ParallelDynamicStitch PlaceholderWithDefault Pow PreventGradient Prod Qr QuantizeAndDequantize
    QuantizeAndDequantizeV2 QuantizeAndDequantizeV3 QuantizeAndDequantizeV4 QuantizeV2 RFFT RFFT2D RFFT3D RGBToHSV
    Range Rank Real RealDiv Reciprocal Relu Relu6 ReluGrad Reshape ResizeArea ResizeBicubic ResizeBilinear
    ResizeNearestNeighbor Reverse ReverseSequence ReverseV2 RightShift Rint Roll Round Rsqrt ScaleAndTranslate ScatterNd
    ScatterNdNonAliasingAdd SegmentMax SegmentMean SegmentMin SegmentProd SegmentSum Select SelectV2 Selu Shape ShapeN
    Sigmoid SigmoidGrad Sign Sin Sinh Size Slice Snapshot Softmax Softplus Softsign SpaceToBatch SpaceToBatchND
    SpaceToDepth Split SplitV Sqrt Square SquaredDifference Squeeze StopGradient StridedSlice Sub Sum Svd Switch Tan
    Tanh TanhGrad TensorScatterAdd TensorScatterMax TensorScatterMin TensorScatterSub TensorScatterUpdate
    TensorStridedSliceUpdate Tile TopK TopKV2 Transpose TruncateDiv TruncateMod Unique UniqueV2 UniqueWithCounts Unpack
    UnravelIndex UnsortedSegmentMax UnsortedSegmentMin UnsortedSegmentProd UnsortedSegmentSum UpperBound Where Xdivy
    Xlog1py Xlogy ZerosLike
    Multinomial ParameterizedTruncatedNormal RandomStandardNormal RandomUniform RandomUniformInt TruncatedNormal
    StatelessMultinomial StatelessRandomGetAlg StatelessRandomGetKeyCounter StatelessRandomGetKeyCounterAlg
    StatelessRandomNormal StatelessRandomNormalV2 StatelessRandomUniform StatelessRandomUniformFullInt
    StatelessRandomUniformFullIntV2 StatelessRandomUniformInt StatelessRandomUniformIntV2 StatelessRandomUniformV2
    StatelessTruncatedNormal StatelessTruncatedNormalV2
    Assert
    """.split()  # noqa: SIM905
)
# They call functions of the same file, each at most once; the functions are checked too.
CALLING = frozenset({"PartitionedCall", "StatefulPartitionedCall", "If", "StatelessIf", "Case", "StatelessCase"})
# They read a variable.
READING = frozenset({"ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VarIsInitializedOp", "VariableShape"})
# They change a variable. In their place stands an operation that does nothing.
ASSIGNING = frozenset({"AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp"})
# They are variables, and stand for the values that convscope has read from the checkpoint.
VARIABLES = frozenset({"VarHandleOp", "VariableV2", "Variable"})

# What may run.
RUNNING = COMPUTING | CALLING | READING | ASSIGNING

# What may lie in a file beside that and is never run, whatever it is called or called by: how TensorFlow saves and
# restores a model's variables, starts and trains it, and loops, which could be without end.
IDLE = frozenset(
    """
    Placeholder PlaceholderV2
    SaveV2 SaveSlices Save RestoreV2 RestoreSlice Restore MergeV2Checkpoints ShardedFilename ShardedFilespec StringJoin
    StaticRegexFullMatch RegexFullMatch StaticRegexReplace AsString
    Assign AssignAdd AssignSub IsVariableInitialized
    DisableCopyOnRead ResourceScatterAdd ResourceScatterSub ResourceScatterUpdate ScatterAdd ScatterSub ScatterUpdate
    While StatelessWhile Enter Exit NextIteration LoopCond RefEnter RefExit RefIdentity RefMerge RefNextIteration
    RefSelect RefSwitch
    EmptyTensorList TensorListConcat TensorListConcatV2 TensorListElementShape TensorListFromTensor TensorListGather
    TensorListGetItem TensorListLength TensorListPopBack TensorListPushBack TensorListReserve TensorListResize
    TensorListScatter TensorListScatterIntoExistingList TensorListScatterV2 TensorListSetItem TensorListSplit
    TensorListStack TensorArrayV3 TensorArrayGatherV3 TensorArrayReadV3 TensorArrayScatterV3 TensorArraySizeV3
    TensorArrayWriteV3 TensorArrayConcatV3 TensorArraySplitV3 TensorArrayGradV3 TensorArrayCloseV3
    StatefulStandardNormal StatefulStandardNormalV2 StatefulTruncatedNormal StatefulUniform StatefulUniformFullInt
    StatefulUniformInt NonDeterministicInts RngReadAndSkip RngSkip RandomCrop RandomShuffle RandomGamma RandomPoissonV2
    ApplyAdadelta ApplyAdagrad ApplyAdam ApplyFtrl ApplyGradientDescent ApplyMomentum ApplyRMSProp ResourceApplyAdadelta
    ResourceApplyAdagrad ResourceApplyAdagradV2 ResourceApplyAdam ResourceApplyAdaMax ResourceApplyFtrl
    ResourceApplyGradientDescent ResourceApplyKerasMomentum ResourceApplyMomentum ResourceApplyRMSProp
    AbsGrad CosGrad Conv2DBackpropFilterV2 Conv3DBackpropFilter Conv3DBackpropFilterV2 CropAndResizeGradBoxes
    CropAndResizeGradImage DepthwiseConv2dNativeBackpropFilter Dilation2DBackpropFilter Dilation2DBackpropInput
    FusedBatchNormGrad FusedBatchNormGradV2 FusedBatchNormGradV3 InvGrad LRNGrad LeakyReluGrad MaxPool3DGrad MaxPoolGrad
    MaxPoolGradV2 MaxPoolGradWithArgmax MirrorPadGrad ReciprocalGrad Relu6Grad ResizeBicubicGrad ResizeBilinearGrad
    ResizeNearestNeighborGrad RsqrtGrad SeluGrad SoftplusGrad SoftsignGrad SoftmaxCrossEntropyWithLogits
    SparseSoftmaxCrossEntropyWithLogits SqrtGrad StridedSliceGrad
    """.split()  # noqa: SIM905
)
