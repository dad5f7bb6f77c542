from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    FP32: _ClassVar[DType]
    FP16: _ClassVar[DType]
    BF16: _ClassVar[DType]
    INT8: _ClassVar[DType]
    INT4: _ClassVar[DType]
    ROTATED_INT4: _ClassVar[DType]

class Activation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NO_ACTIVATION: _ClassVar[Activation]
    RELU: _ClassVar[Activation]
    GELU: _ClassVar[Activation]
    SILU: _ClassVar[Activation]
    TANH: _ClassVar[Activation]
DTYPE_UNSPECIFIED: DType
FP32: DType
FP16: DType
BF16: DType
INT8: DType
INT4: DType
ROTATED_INT4: DType
NO_ACTIVATION: Activation
RELU: Activation
GELU: Activation
SILU: Activation
TANH: Activation

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "exponent", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    EXPONENT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    exponent: int
    data: bytes
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., exponent: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("protocol_version",)
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    def __init__(self, protocol_version: _Optional[int] = ...) -> None: ...

class ModuleInfo(_message.Message):
    __slots__ = ("name", "out_features", "allowed", "weight_norm")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OUT_FEATURES_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_NORM_FIELD_NUMBER: _ClassVar[int]
    name: str
    out_features: int
    allowed: bool
    weight_norm: float
    def __init__(self, name: _Optional[str] = ..., out_features: _Optional[int] = ..., allowed: _Optional[bool] = ..., weight_norm: _Optional[float] = ...) -> None: ...

class SiteInfo(_message.Message):
    __slots__ = ("in_features", "modules")
    IN_FEATURES_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    in_features: int
    modules: _containers.RepeatedCompositeFieldContainer[ModuleInfo]
    def __init__(self, in_features: _Optional[int] = ..., modules: _Optional[_Iterable[_Union[ModuleInfo, _Mapping]]] = ...) -> None: ...

class FileInfo(_message.Message):
    __slots__ = ("name", "size", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    sha256: str
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_tokens", "max_length", "max_message_bytes", "max_inflight_bytes", "bytes_per_token", "bytes_per_token_squared", "cache_bytes_per_token", "deep_rollback", "cache_bytes_per_sequence", "no_rollback", "whole_prompts", "prefix_bytes", "max_streams")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_INFLIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_TOKEN_SQUARED_FIELD_NUMBER: _ClassVar[int]
    CACHE_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    DEEP_ROLLBACK_FIELD_NUMBER: _ClassVar[int]
    CACHE_BYTES_PER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    NO_ROLLBACK_FIELD_NUMBER: _ClassVar[int]
    WHOLE_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAMS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    max_length: int
    max_message_bytes: int
    max_inflight_bytes: int
    bytes_per_token: float
    bytes_per_token_squared: float
    cache_bytes_per_token: int
    deep_rollback: bool
    cache_bytes_per_sequence: int
    no_rollback: bool
    whole_prompts: bool
    prefix_bytes: int
    max_streams: int
    def __init__(self, max_tokens: _Optional[int] = ..., max_length: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_inflight_bytes: _Optional[int] = ..., bytes_per_token: _Optional[float] = ..., bytes_per_token_squared: _Optional[float] = ..., cache_bytes_per_token: _Optional[int] = ..., deep_rollback: _Optional[bool] = ..., cache_bytes_per_sequence: _Optional[int] = ..., no_rollback: _Optional[bool] = ..., whole_prompts: _Optional[bool] = ..., prefix_bytes: _Optional[int] = ..., max_streams: _Optional[int] = ...) -> None: ...

class Description(_message.Message):
    __slots__ = ("protocol_version", "software_version", "model_id", "fingerprint", "config_json", "compute_dtype", "embedding_width", "hidden_width", "sites", "wire_dtypes", "limits", "edge_files", "replicas", "layers", "head_width", "full_head", "all_rows", "tables", "experts")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_WIDTH_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_WIDTH_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    EDGE_FILES_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HEAD_WIDTH_FIELD_NUMBER: _ClassVar[int]
    FULL_HEAD_FIELD_NUMBER: _ClassVar[int]
    ALL_ROWS_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    software_version: str
    model_id: str
    fingerprint: str
    config_json: str
    compute_dtype: str
    embedding_width: int
    hidden_width: int
    sites: _containers.RepeatedCompositeFieldContainer[SiteInfo]
    wire_dtypes: _containers.RepeatedScalarFieldContainer[DType]
    limits: Limits
    edge_files: _containers.RepeatedCompositeFieldContainer[FileInfo]
    replicas: _containers.RepeatedScalarFieldContainer[str]
    layers: DecoderLayers
    head_width: int
    full_head: bool
    all_rows: bool
    tables: _containers.RepeatedScalarFieldContainer[str]
    experts: _containers.RepeatedCompositeFieldContainer[FusedWeight]
    def __init__(self, protocol_version: _Optional[int] = ..., software_version: _Optional[str] = ..., model_id: _Optional[str] = ..., fingerprint: _Optional[str] = ..., config_json: _Optional[str] = ..., compute_dtype: _Optional[str] = ..., embedding_width: _Optional[int] = ..., hidden_width: _Optional[int] = ..., sites: _Optional[_Iterable[_Union[SiteInfo, _Mapping]]] = ..., wire_dtypes: _Optional[_Iterable[_Union[DType, str]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., edge_files: _Optional[_Iterable[_Union[FileInfo, _Mapping]]] = ..., replicas: _Optional[_Iterable[str]] = ..., layers: _Optional[_Union[DecoderLayers, _Mapping]] = ..., head_width: _Optional[int] = ..., full_head: _Optional[bool] = ..., all_rows: _Optional[bool] = ..., tables: _Optional[_Iterable[str]] = ..., experts: _Optional[_Iterable[_Union[FusedWeight, _Mapping]]] = ...) -> None: ...

class FusedWeight(_message.Message):
    __slots__ = ("name", "experts", "in_features", "out_features", "transposed", "allowed", "site", "rows")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    IN_FEATURES_FIELD_NUMBER: _ClassVar[int]
    OUT_FEATURES_FIELD_NUMBER: _ClassVar[int]
    TRANSPOSED_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    name: str
    experts: int
    in_features: int
    out_features: int
    transposed: bool
    allowed: bool
    site: int
    rows: float
    def __init__(self, name: _Optional[str] = ..., experts: _Optional[int] = ..., in_features: _Optional[int] = ..., out_features: _Optional[int] = ..., transposed: _Optional[bool] = ..., allowed: _Optional[bool] = ..., site: _Optional[int] = ..., rows: _Optional[float] = ...) -> None: ...

class DecoderLayers(_message.Message):
    __slots__ = ("count", "width", "in_tuple", "max_first", "max_last", "files")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    IN_TUPLE_FIELD_NUMBER: _ClassVar[int]
    MAX_FIRST_FIELD_NUMBER: _ClassVar[int]
    MAX_LAST_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    count: int
    width: int
    in_tuple: bool
    max_first: int
    max_last: int
    files: _containers.RepeatedCompositeFieldContainer[FileInfo]
    def __init__(self, count: _Optional[int] = ..., width: _Optional[int] = ..., in_tuple: _Optional[bool] = ..., max_first: _Optional[int] = ..., max_last: _Optional[int] = ..., files: _Optional[_Iterable[_Union[FileInfo, _Mapping]]] = ...) -> None: ...

class FetchEdgeFilesRequest(_message.Message):
    __slots__ = ("fingerprint", "names")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, fingerprint: _Optional[str] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class FileChunk(_message.Message):
    __slots__ = ("name", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    data: bytes
    def __init__(self, name: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class ActiveSite(_message.Message):
    __slots__ = ("site", "modules")
    SITE_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    site: int
    modules: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, site: _Optional[int] = ..., modules: _Optional[_Iterable[int]] = ...) -> None: ...

class FrozenModule(_message.Message):
    __slots__ = ("a", "b")
    A_FIELD_NUMBER: _ClassVar[int]
    B_FIELD_NUMBER: _ClassVar[int]
    a: Tensor
    b: Tensor
    def __init__(self, a: _Optional[_Union[Tensor, _Mapping]] = ..., b: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class PutAdapterRequest(_message.Message):
    __slots__ = ("fingerprint", "modules")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    modules: _containers.RepeatedCompositeFieldContainer[FrozenModule]
    def __init__(self, fingerprint: _Optional[str] = ..., modules: _Optional[_Iterable[_Union[FrozenModule, _Mapping]]] = ...) -> None: ...

class PutAdapterReply(_message.Message):
    __slots__ = ("hashes",)
    HASHES_FIELD_NUMBER: _ClassVar[int]
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, hashes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class IdleModule(_message.Message):
    __slots__ = ("site", "module", "hash")
    SITE_FIELD_NUMBER: _ClassVar[int]
    MODULE_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    site: int
    module: int
    hash: bytes
    def __init__(self, site: _Optional[int] = ..., module: _Optional[int] = ..., hash: _Optional[bytes] = ...) -> None: ...

class HostedDropout(_message.Message):
    __slots__ = ("rank", "p")
    RANK_FIELD_NUMBER: _ClassVar[int]
    P_FIELD_NUMBER: _ClassVar[int]
    rank: int
    p: float
    def __init__(self, rank: _Optional[int] = ..., p: _Optional[float] = ...) -> None: ...

class HostedModule(_message.Message):
    __slots__ = ("site", "module", "rank", "a_bias", "b_bias", "hash", "keep", "activation", "dropouts")
    SITE_FIELD_NUMBER: _ClassVar[int]
    MODULE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    A_BIAS_FIELD_NUMBER: _ClassVar[int]
    B_BIAS_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    DROPOUTS_FIELD_NUMBER: _ClassVar[int]
    site: int
    module: int
    rank: int
    a_bias: bool
    b_bias: bool
    hash: bytes
    keep: bool
    activation: Activation
    dropouts: _containers.RepeatedCompositeFieldContainer[HostedDropout]
    def __init__(self, site: _Optional[int] = ..., module: _Optional[int] = ..., rank: _Optional[int] = ..., a_bias: _Optional[bool] = ..., b_bias: _Optional[bool] = ..., hash: _Optional[bytes] = ..., keep: _Optional[bool] = ..., activation: _Optional[_Union[Activation, str]] = ..., dropouts: _Optional[_Iterable[_Union[HostedDropout, _Mapping]]] = ...) -> None: ...

class ModuleTensors(_message.Message):
    __slots__ = ("a", "b", "a_bias", "b_bias")
    A_FIELD_NUMBER: _ClassVar[int]
    B_FIELD_NUMBER: _ClassVar[int]
    A_BIAS_FIELD_NUMBER: _ClassVar[int]
    B_BIAS_FIELD_NUMBER: _ClassVar[int]
    a: Tensor
    b: Tensor
    a_bias: Tensor
    b_bias: Tensor
    def __init__(self, a: _Optional[_Union[Tensor, _Mapping]] = ..., b: _Optional[_Union[Tensor, _Mapping]] = ..., a_bias: _Optional[_Union[Tensor, _Mapping]] = ..., b_bias: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class HostedTensors(_message.Message):
    __slots__ = ("first", "modules")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    first: int
    modules: _containers.RepeatedCompositeFieldContainer[ModuleTensors]
    def __init__(self, first: _Optional[int] = ..., modules: _Optional[_Iterable[_Union[ModuleTensors, _Mapping]]] = ...) -> None: ...

class Codecs(_message.Message):
    __slots__ = ("x", "dx", "deltas", "delta_grads", "ends", "factors")
    X_FIELD_NUMBER: _ClassVar[int]
    DX_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    DELTA_GRADS_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    FACTORS_FIELD_NUMBER: _ClassVar[int]
    x: DType
    dx: DType
    deltas: DType
    delta_grads: DType
    ends: DType
    factors: DType
    def __init__(self, x: _Optional[_Union[DType, str]] = ..., dx: _Optional[_Union[DType, str]] = ..., deltas: _Optional[_Union[DType, str]] = ..., delta_grads: _Optional[_Union[DType, str]] = ..., ends: _Optional[_Union[DType, str]] = ..., factors: _Optional[_Union[DType, str]] = ...) -> None: ...

class Prefixes(_message.Message):
    __slots__ = ("layer", "names")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    layer: int
    names: bytes
    def __init__(self, layer: _Optional[int] = ..., names: _Optional[bytes] = ...) -> None: ...

class Begin(_message.Message):
    __slots__ = ("protocol_version", "fingerprint", "wire_dtype", "training", "batch", "length", "attention_mask", "position_ids", "dense", "keep", "sites", "embeddings", "cache_length", "rollback", "factored", "idle", "probe", "edge_first", "edge_last", "wants_input_grad", "hosted", "modules", "dropout_seed", "codecs", "drop_input_grads", "module_frames", "rank", "prefixes")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MASK_FIELD_NUMBER: _ClassVar[int]
    POSITION_IDS_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    CACHE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    ROLLBACK_FIELD_NUMBER: _ClassVar[int]
    FACTORED_FIELD_NUMBER: _ClassVar[int]
    IDLE_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    EDGE_FIRST_FIELD_NUMBER: _ClassVar[int]
    EDGE_LAST_FIELD_NUMBER: _ClassVar[int]
    WANTS_INPUT_GRAD_FIELD_NUMBER: _ClassVar[int]
    HOSTED_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_SEED_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    DROP_INPUT_GRADS_FIELD_NUMBER: _ClassVar[int]
    MODULE_FRAMES_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    PREFIXES_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    fingerprint: str
    wire_dtype: DType
    training: bool
    batch: int
    length: int
    attention_mask: bytes
    position_ids: _containers.RepeatedScalarFieldContainer[int]
    dense: bool
    keep: _containers.RepeatedScalarFieldContainer[int]
    sites: _containers.RepeatedCompositeFieldContainer[ActiveSite]
    embeddings: Tensor
    cache_length: int
    rollback: bool
    factored: bool
    idle: _containers.RepeatedCompositeFieldContainer[IdleModule]
    probe: _containers.RepeatedCompositeFieldContainer[ActiveSite]
    edge_first: int
    edge_last: int
    wants_input_grad: bool
    hosted: bool
    modules: _containers.RepeatedCompositeFieldContainer[HostedModule]
    dropout_seed: int
    codecs: Codecs
    drop_input_grads: bool
    module_frames: int
    rank: int
    prefixes: Prefixes
    def __init__(self, protocol_version: _Optional[int] = ..., fingerprint: _Optional[str] = ..., wire_dtype: _Optional[_Union[DType, str]] = ..., training: _Optional[bool] = ..., batch: _Optional[int] = ..., length: _Optional[int] = ..., attention_mask: _Optional[bytes] = ..., position_ids: _Optional[_Iterable[int]] = ..., dense: _Optional[bool] = ..., keep: _Optional[_Iterable[int]] = ..., sites: _Optional[_Iterable[_Union[ActiveSite, _Mapping]]] = ..., embeddings: _Optional[_Union[Tensor, _Mapping]] = ..., cache_length: _Optional[int] = ..., rollback: _Optional[bool] = ..., factored: _Optional[bool] = ..., idle: _Optional[_Iterable[_Union[IdleModule, _Mapping]]] = ..., probe: _Optional[_Iterable[_Union[ActiveSite, _Mapping]]] = ..., edge_first: _Optional[int] = ..., edge_last: _Optional[int] = ..., wants_input_grad: _Optional[bool] = ..., hosted: _Optional[bool] = ..., modules: _Optional[_Iterable[_Union[HostedModule, _Mapping]]] = ..., dropout_seed: _Optional[int] = ..., codecs: _Optional[_Union[Codecs, _Mapping]] = ..., drop_input_grads: _Optional[bool] = ..., module_frames: _Optional[int] = ..., rank: _Optional[int] = ..., prefixes: _Optional[_Union[Prefixes, _Mapping]] = ...) -> None: ...

class Extend(_message.Message):
    __slots__ = ("drop", "order", "length", "attention_mask", "position_ids", "dense", "keep", "embeddings")
    DROP_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MASK_FIELD_NUMBER: _ClassVar[int]
    POSITION_IDS_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    drop: int
    order: _containers.RepeatedScalarFieldContainer[int]
    length: int
    attention_mask: bytes
    position_ids: _containers.RepeatedScalarFieldContainer[int]
    dense: bool
    keep: _containers.RepeatedScalarFieldContainer[int]
    embeddings: Tensor
    def __init__(self, drop: _Optional[int] = ..., order: _Optional[_Iterable[int]] = ..., length: _Optional[int] = ..., attention_mask: _Optional[bytes] = ..., position_ids: _Optional[_Iterable[int]] = ..., dense: _Optional[bool] = ..., keep: _Optional[_Iterable[int]] = ..., embeddings: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class SiteDeltas(_message.Message):
    __slots__ = ("site", "deltas", "factors")
    SITE_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    FACTORS_FIELD_NUMBER: _ClassVar[int]
    site: int
    deltas: _containers.RepeatedCompositeFieldContainer[Tensor]
    factors: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, site: _Optional[int] = ..., deltas: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., factors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class InputGrad(_message.Message):
    __slots__ = ("site", "grad")
    SITE_FIELD_NUMBER: _ClassVar[int]
    GRAD_FIELD_NUMBER: _ClassVar[int]
    site: int
    grad: Tensor
    def __init__(self, site: _Optional[int] = ..., grad: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class HiddenGrad(_message.Message):
    __slots__ = ("grad",)
    GRAD_FIELD_NUMBER: _ClassVar[int]
    grad: Tensor
    def __init__(self, grad: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class EdgeFrame(_message.Message):
    __slots__ = ("begin", "deltas", "hidden_grad", "input_grad", "extend", "modules")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_GRAD_FIELD_NUMBER: _ClassVar[int]
    INPUT_GRAD_FIELD_NUMBER: _ClassVar[int]
    EXTEND_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    begin: Begin
    deltas: SiteDeltas
    hidden_grad: HiddenGrad
    input_grad: InputGrad
    extend: Extend
    modules: HostedTensors
    def __init__(self, begin: _Optional[_Union[Begin, _Mapping]] = ..., deltas: _Optional[_Union[SiteDeltas, _Mapping]] = ..., hidden_grad: _Optional[_Union[HiddenGrad, _Mapping]] = ..., input_grad: _Optional[_Union[InputGrad, _Mapping]] = ..., extend: _Optional[_Union[Extend, _Mapping]] = ..., modules: _Optional[_Union[HostedTensors, _Mapping]] = ...) -> None: ...

class SiteInput(_message.Message):
    __slots__ = ("site", "x", "wants_input_grad")
    SITE_FIELD_NUMBER: _ClassVar[int]
    X_FIELD_NUMBER: _ClassVar[int]
    WANTS_INPUT_GRAD_FIELD_NUMBER: _ClassVar[int]
    site: int
    x: Tensor
    wants_input_grad: bool
    def __init__(self, site: _Optional[int] = ..., x: _Optional[_Union[Tensor, _Mapping]] = ..., wants_input_grad: _Optional[bool] = ...) -> None: ...

class Hidden(_message.Message):
    __slots__ = ("hidden", "forward_flops")
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FLOPS_FIELD_NUMBER: _ClassVar[int]
    hidden: Tensor
    forward_flops: int
    def __init__(self, hidden: _Optional[_Union[Tensor, _Mapping]] = ..., forward_flops: _Optional[int] = ...) -> None: ...

class DeltaGrads(_message.Message):
    __slots__ = ("site", "grads", "factor_grads")
    SITE_FIELD_NUMBER: _ClassVar[int]
    GRADS_FIELD_NUMBER: _ClassVar[int]
    FACTOR_GRADS_FIELD_NUMBER: _ClassVar[int]
    site: int
    grads: _containers.RepeatedCompositeFieldContainer[Tensor]
    factor_grads: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, site: _Optional[int] = ..., grads: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., factor_grads: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("forward_flops", "backward_flops", "probe", "input_grad", "module_grads")
    FORWARD_FLOPS_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FLOPS_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    INPUT_GRAD_FIELD_NUMBER: _ClassVar[int]
    MODULE_GRADS_FIELD_NUMBER: _ClassVar[int]
    forward_flops: int
    backward_flops: int
    probe: _containers.RepeatedScalarFieldContainer[float]
    input_grad: Tensor
    module_grads: _containers.RepeatedCompositeFieldContainer[HostedTensors]
    def __init__(self, forward_flops: _Optional[int] = ..., backward_flops: _Optional[int] = ..., probe: _Optional[_Iterable[float]] = ..., input_grad: _Optional[_Union[Tensor, _Mapping]] = ..., module_grads: _Optional[_Iterable[_Union[HostedTensors, _Mapping]]] = ...) -> None: ...

class CloudFrame(_message.Message):
    __slots__ = ("input", "hidden", "delta_grads", "done", "module_grads", "compute_s")
    INPUT_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    DELTA_GRADS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    MODULE_GRADS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    input: SiteInput
    hidden: Hidden
    delta_grads: DeltaGrads
    done: Done
    module_grads: HostedTensors
    compute_s: float
    def __init__(self, input: _Optional[_Union[SiteInput, _Mapping]] = ..., hidden: _Optional[_Union[Hidden, _Mapping]] = ..., delta_grads: _Optional[_Union[DeltaGrads, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., module_grads: _Optional[_Union[HostedTensors, _Mapping]] = ..., compute_s: _Optional[float] = ...) -> None: ...
