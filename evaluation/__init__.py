# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Evaluation of models at any number of loops: likelihood, generative perplexity, attention and states by loop, and the
number of loops that is enough; and answers to any number of rows. The lm-eval adapter is
`loopmdm.evaluation.lm_eval_model`, which needs `pip install loopmdm[eval]`.
"""

from ..objective import NelboEstimate, nelbo
from .dynamics import Dynamics, measure_dynamics
from .loop_budget import LoopBudget, calibrate_loops
from .perplexity import GenerativePerplexity, TextLikelihood, generative_perplexity, text_likelihood
from .rows import RowsReport, generate_rows
from .texts import Text, make_windows, read_texts

__all__ = [
    "Dynamics",
    "GenerativePerplexity",
    "LoopBudget",
    "NelboEstimate",
    "RowsReport",
    "Text",
    "TextLikelihood",
    "calibrate_loops",
    "generate_rows",
    "generative_perplexity",
    "make_windows",
    "measure_dynamics",
    "nelbo",
    "read_texts",
    "text_likelihood",
]
