"""Tasks on which methods are compared: each has one file, and a line here."""

from experiments.tasks.aime24 import AIME24 as AIME24
from experiments.tasks.arc_challenge import ARCChallenge as ARCChallenge
from experiments.tasks.base import TASKS as TASKS
from experiments.tasks.base import get as get
from experiments.tasks.base import register as register
from experiments.tasks.common_words import CommonWords as CommonWords
from experiments.tasks.countdown import Countdown as Countdown
from experiments.tasks.frequent_words import FrequentWords as FrequentWords
from experiments.tasks.gpqa import GPQA as GPQA
from experiments.tasks.graphs import Graphs as Graphs
from experiments.tasks.grids import Grids as Grids
from experiments.tasks.gsm8k import GSM8K as GSM8K
from experiments.tasks.gsm8k_cot import GSM8KCoT as GSM8KCoT
from experiments.tasks.hellaswag import HellaSwag as HellaSwag
from experiments.tasks.humaneval import HumanEval as HumanEval
from experiments.tasks.livecodebench import LiveCodeBench as LiveCodeBench
from experiments.tasks.math500 import Math500 as Math500
from experiments.tasks.mmlu import MMLU as MMLU
from experiments.tasks.needle import Needle as Needle
from experiments.tasks.needle import NeedleMultiKey as NeedleMultiKey
from experiments.tasks.needle import NeedleMultiQuery as NeedleMultiQuery
from experiments.tasks.needle import NeedleMultiValue as NeedleMultiValue
from experiments.tasks.programs import Programs as Programs
from experiments.tasks.tracking import Tracking as Tracking
