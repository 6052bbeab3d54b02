"""The table of tasks: what each script, its config table, its model class and its checkpoints are called."""

from collections.abc import Callable

from torch import nn

from simla.configs.schema import GROUNDING, NLVR, PRETRAIN, PRETRAIN_NLVR, RETRIEVAL, VE, VQA
from simla.models.nlvr import SIMLANLVR
from simla.models.pretrain import SIMLA
from simla.models.pretrain_nlvr import SIMLAPretrainNLVR
from simla.models.retrieval import SIMLARetrieval
from simla.models.ve import SIMLAVE
from simla.models.vqa import SIMLAVQA

TASKS: dict[str, tuple[dict, Callable[[dict], nn.Module]]] = {  # of the script: config table, model
    "Pretrain": (PRETRAIN, lambda config: SIMLA.from_config(config, cls_id=0)),
    "Retrieval": (RETRIEVAL, SIMLARetrieval.from_config),
    "zero_shot_retrieval": (RETRIEVAL, lambda config: SIMLARetrieval.from_config(config, twins=False)),
    "Grounding": (GROUNDING, SIMLARetrieval.from_config),
    "VQA": (VQA, SIMLAVQA.from_config),
    "Pretrain_NLVR": (PRETRAIN_NLVR, SIMLAPretrainNLVR.from_config),
    "NLVR": (NLVR, SIMLANLVR.from_config),
    "VE": (VE, SIMLAVE.from_config),
}


LOADED_AS = {  # kind of checkpoint -> the task that reads it here, by the rows of `checkpoint`
    "pretrain": "zero_shot_retrieval",
    "retrieval": "zero_shot_retrieval",
    "vqa": "VQA",
    "ve": "VE",
    "nlvr": "NLVR",
}


WRITTEN_BY = {  # kind of checkpoint -> the script that makes it
    "pretrain": "Pretrain.py",
    "retrieval": "Retrieval.py or Grounding.py",
    "vqa": "VQA.py",
    "ve": "VE.py",
    "nlvr": "NLVR.py",
}
