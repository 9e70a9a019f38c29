"""Tasks on which methods are compared: one file for each, and one line here."""

from experiments.tasks.base import TASKS as TASKS
from experiments.tasks.base import get as get
from experiments.tasks.base import register as register
from experiments.tasks.gsm8k import GSM8K as GSM8K
from experiments.tasks.hellaswag import HellaSwag as HellaSwag
from experiments.tasks.humaneval import HumanEval as HumanEval
from experiments.tasks.livecodebench import LiveCodeBench as LiveCodeBench
from experiments.tasks.mmlu import MMLU as MMLU
from experiments.tasks.needle import Needle as Needle
from experiments.tasks.tracking import Tracking as Tracking
