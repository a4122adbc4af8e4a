"""The sections of an experiment that hold plain settings: model, data, partition, training, Flower. Costs nothing."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from spryfl.options import STRICT, spelled


class ModelSection(BaseModel):
    """The language model."""

    model_config = STRICT
    name: str = "minilm"  # a local folder, a hub name, or the alias minilm
    revision: str = ""  # of a hub name
    attention: Literal["default", "eager", "sdpa"] = "default"
    trust_remote_code: bool = False
    adapter: str = ""  # folder of a saved adapter to start from
    stream: bool = False  # of a packed folder one block in memory at a time, the next read ahead


class DataSection(BaseModel):
    """Where the examples come from; empty column names are guessed, and the guess is said."""

    model_config = STRICT
    name: str = "docstrings"  # a file, a folder with train and test files, a hub name, or docstrings
    text: str = ""
    pair: str = ""
    label: str = ""
    group: str = ""
    test: str = ""  # another file with the test rows
    test_share: float = Field(0.2, gt=0, lt=1)
    train_rows: int = Field(0, ge=0)  # 0 = all
    test_rows: int = Field(0, ge=0)
    max_length: int = Field(128, ge=4)  # tokens
    drop_unlabelled: bool = False  # leave out rows whose label is -1
    revision: str = ""


class PartitionSection(BaseModel):
    """How the training rows fall to the clients."""

    model_config = STRICT
    clients: int = Field(40, ge=1)
    held_out: float = Field(0.1, ge=0, lt=1)  # share of each client's rows kept for its own accuracy
    split: dict[str, Any] = {}

    @field_validator("split", mode="before")
    @classmethod
    def _full_split(cls, value: Any) -> Any:
        return spelled("split", value)


class TrainSection(BaseModel):
    """The rounds."""

    model_config = STRICT
    rounds: int = Field(24, ge=1)
    cohort: int = Field(8, ge=1)  # clients a round
    batch_size: int = Field(8, ge=1)
    micro_batch: int = Field(0, ge=0)  # rows in memory at once, also in scoring; 0 = whole batches
    epochs: int = Field(0, ge=0)  # local passes over a client's rows, instead of steps
    steps: int = Field(10, ge=0)  # local batches a round
    eval_every: int = Field(6, ge=1)  # rounds
    patience: int = Field(0, ge=0)  # stop after so many evaluations without a better one; 0 = never
    max_passes: int = Field(0, ge=0)  # end with the round that reaches it: value + tangent + backward; 0 = no limit
    max_megabytes: float = Field(0.0, ge=0)  # the same, up and down, 1e6 bytes
    max_seconds: float = Field(0.0, ge=0)  # the same, of rounds and evaluations
    drop_clients: float = Field(0.0, ge=0, lt=1)  # simulated share of clients that do not answer
    min_answers: float = Field(0.0, ge=0, le=1)  # share of a cohort; with fewer the round is repeated with another one
    tries: int = Field(1, ge=1)  # cohorts of a round at most, with min_answers
    rest: int = Field(0, ge=0)  # rounds that a client is left out for once it failed twice running
    dropout: bool = False  # the model's own dropout layers while training
    probe: int = Field(0, ge=0)  # training rows on which estimates are held against the true gradient; 0 = never
    probe_every: int = Field(0, ge=0)  # rounds between two such looks; 0 = with each evaluation
    keep_prefix: float = Field(0.0, ge=0)  # MB of hidden states kept over a client's local epochs; batches then stay


class PrivacySection(BaseModel):
    """Differential privacy of the values, a client's data being what neighbours differ in; off without a clip."""

    model_config = STRICT
    clip: float = Field(0.0, ge=0, allow_inf_nan=False)  # largest norm of a client's answer; 0 = no promise
    noise: float = Field(1.0, ge=0, allow_inf_nan=False)  # standard deviation on the sum of answers, in units of clip
    delta: float = Field(1e-5, gt=0, lt=1)  # the chance that the promise of epsilon fails
    key: int = Field(0, ge=0, lt=2**62)  # of the noise; 0 = drawn by the server. Another can be repeated, is no secret


class FlowerSection(BaseModel):
    """What only a run over Flower needs; in this process it has no part to play."""

    model_config = STRICT
    deadline: float = Field(0.0, ge=0)  # seconds of a round's exchange; later answers are dropped. 0 = wait for all
    wait: float = Field(120.0, gt=0)  # seconds to wait at the start for the nodes
    nodes: int = Field(0, ge=0)  # to wait for; 0 = as many as the first one says, or one a client if they hold data
