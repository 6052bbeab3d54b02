"""The table of tasks: each script's model, the checkpoints that it starts from and writes.

The keys of its config are in configs/schema.py, under the same name.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import nn

from simla.checkpoint import key_maps
from simla.checkpoint.key_maps import BERT, DECODER, MIM, MLM, PROJECTIONS, QUEUES, TWINS, Row
from simla.models.nlvr import SIMLANLVR
from simla.models.pretrain import SIMLA
from simla.models.pretrain_nlvr import SIMLAPretrainNLVR
from simla.models.retrieval import SIMLARetrieval
from simla.models.ve import SIMLAVE
from simla.models.vqa import SIMLAVQA


class Task(NamedTuple):
    """build: config -> model; writes: the kind of its checkpoints, "" for none; starts_from: kind -> which
    name of the file fills which of the model; loads: the kinds that `simla.load` reads as this task does.
    """

    build: Callable[[dict], nn.Module]
    writes: str
    starts_from: dict[str, Row]
    loads: tuple[str, ...] = ()


TO_RETRIEVAL = Row(BERT, fresh=("idx_queue",), unused=MIM + MLM)
TO_ZERO_SHOT = Row(BERT, fresh=("idx_queue",), unused=MIM + MLM + TWINS + QUEUES)
TO_VQA = Row(BERT + DECODER, unused=(*MIM, *QUEUES, *PROJECTIONS, "itm_head"))
TO_PRETRAIN_NLVR = Row(
    (("text_encoder.", "text_encoder.bert.", key_maps.upper_half_twice),),
    fresh=("ta_head", "text_encoder.embeddings.token_type_embeddings"),
    unused=(*MIM, *MLM, *QUEUES, *TWINS, "itm_head"),
)
TO_NLVR = Row(fresh=("cls_head", "visual_encoder_m.", "text_encoder_m."), unused=(*PROJECTIONS, "ta_head"))
TO_VE = Row(BERT, fresh=("cls_head",), unused=(*MIM, *MLM, *QUEUES, *PROJECTIONS, "itm_head"))

TASKS = {  # by the script
    "Pretrain": Task(
        lambda config: SIMLA.from_config(config, cls_id=0), "pretrain", {"pretrain": Row(fresh=MIM)}
    ),
    "Retrieval": Task(
        SIMLARetrieval.from_config, "retrieval", {"pretrain": TO_RETRIEVAL, "retrieval": Row()}
    ),
    "zero_shot_retrieval": Task(  # evaluation only: a model without momentum twins and queues will do
        lambda config: SIMLARetrieval.from_config(config, twins=False),
        "",
        {"pretrain": TO_ZERO_SHOT, "retrieval": Row(fresh=("idx_queue",), unused=TWINS + QUEUES)},
        loads=("pretrain", "retrieval"),
    ),
    "Grounding": Task(
        SIMLARetrieval.from_config, "retrieval", {"pretrain": TO_RETRIEVAL, "retrieval": Row()}
    ),
    "VQA": Task(SIMLAVQA.from_config, "vqa", {"pretrain": TO_VQA, "vqa": Row()}, loads=("vqa",)),
    "Pretrain_NLVR": Task(
        SIMLAPretrainNLVR.from_config,
        "pretrain_nlvr",
        {"pretrain": TO_PRETRAIN_NLVR, "pretrain_nlvr": Row()},
    ),
    "NLVR": Task(SIMLANLVR.from_config, "nlvr", {"pretrain_nlvr": TO_NLVR, "nlvr": Row()}, loads=("nlvr",)),
    "VE": Task(SIMLAVE.from_config, "ve", {"pretrain": TO_VE, "ve": Row()}, loads=("ve",)),
}


def written_by(kinds: Iterable[str]) -> str:
    """Return the scripts that write checkpoints of these kinds, "Retrieval.py or Grounding.py"."""
    return " or ".join(f"{name}.py" for kind in kinds for name, task in TASKS.items() if task.writes == kind)
