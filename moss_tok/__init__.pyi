"""The public names of moss_tok and where they are defined."""

from .codec.config import CodecConfig as CodecConfig
from .codec.inference import Codec as Codec
from .codec.inference import Decoded as Decoded
from .codec.inference import Encoded as Encoded
from .codec.inference import decode as decode
from .codec.inference import encode as encode
from .codec.live import DecoderStream as DecoderStream
from .codec.live import EncoderStream as EncoderStream
from .codec.presets import preset as preset
from .codec.pretrained import load as load
from .codec.streaming import StreamState as StreamState
from .codec.streaming import decode_step as decode_step
from .codec.streaming import encode_step as encode_step
from .codec.streaming import init_decoder_stream as init_decoder_stream
from .codec.streaming import init_encoder_stream as init_encoder_stream
from .codec.streaming import reset_streams as reset_streams
from .nn.compute import ComputeConfig as ComputeConfig
from .version import __version__ as __version__
