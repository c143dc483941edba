"""Click models: LR, FM, FNN, IPNN, DeepFM, Wide & Deep, DCN-V2 and DLRM, on compressed tables."""

from recsys_models.ctr.base import CTRModel
from recsys_models.ctr.dcnv2 import DCNv2
from recsys_models.ctr.deepfm import DeepFM
from recsys_models.ctr.dlrm import DLRM
from recsys_models.ctr.fm import FM
from recsys_models.ctr.fnn import FNN
from recsys_models.ctr.ipnn import IPNN
from recsys_models.ctr.lr import LR
from recsys_models.ctr.registry import MODELS, build_model, get_model
from recsys_models.ctr.widedeep import WideDeep

__all__ = [
    "DLRM",
    "FM",
    "FNN",
    "IPNN",
    "LR",
    "MODELS",
    "CTRModel",
    "DCNv2",
    "DeepFM",
    "WideDeep",
    "build_model",
    "get_model",
]
