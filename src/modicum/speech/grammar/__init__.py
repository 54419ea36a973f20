"""Grammar: voice commands with the spellings that a small acoustic model hears for them.

After "Automatic Grammar Augmentation for Robust Voice Command Recognition" (Yang et al. 2018, arXiv
1811.06096), of which we could read the abstract: what it leaves open is our reading, and each file says so.
Patents cover this method in the United States: see NOTICE. The names below load when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modicum.lazy_names import lazy_names

if TYPE_CHECKING:
    from modicum.speech.grammar.candidates import (
        CandidateSettings,
        Expression,
        candidate_expressions,
        original_expressions,
    )
    from modicum.speech.grammar.command_model import CommandModel, open_model
    from modicum.speech.grammar.commands import check_commands, read_commands
    from modicum.speech.grammar.ctc_forward import ctc_scores
    from modicum.speech.grammar.ctc_model import CtcModel
    from modicum.speech.grammar.decision import Decisions, Rates, rates, threshold_for
    from modicum.speech.grammar.dictionary import PronunciationDictionary, learn_dictionary
    from modicum.speech.grammar.entry import GrammarReport, GrammarSettings, evaluate_grammar, search_grammar
    from modicum.speech.grammar.evaluation import GrammarRates, LabelledScores, grammar_rates
    from modicum.speech.grammar.export import Exported, command_of, export_grammar
    from modicum.speech.grammar.grammar_file import Grammar
    from modicum.speech.grammar.objective import GrammarObjective, ObjectiveSettings
    from modicum.speech.grammar.page import write_evaluation_page, write_search_page
    from modicum.speech.grammar.recordings import Recording, read_other_speech, read_recordings
    from modicum.speech.grammar.score_table import ScoreTable, compute_scores
    from modicum.speech.grammar.sphinx_model import SphinxModel

_HOMES = {
    "commands": ("read_commands", "check_commands"),
    "recordings": ("Recording", "read_recordings", "read_other_speech"),
    "command_model": ("CommandModel", "open_model"),
    "ctc_model": ("CtcModel",),
    "ctc_forward": ("ctc_scores",),
    "sphinx_model": ("SphinxModel",),
    "dictionary": ("PronunciationDictionary", "learn_dictionary"),
    "candidates": ("Expression", "CandidateSettings", "original_expressions", "candidate_expressions"),
    "score_table": ("ScoreTable", "compute_scores"),
    "decision": ("Decisions", "Rates", "rates", "threshold_for"),
    "objective": ("GrammarObjective", "ObjectiveSettings"),
    "evaluation": ("LabelledScores", "GrammarRates", "grammar_rates"),
    "grammar_file": ("Grammar",),
    "entry": ("GrammarSettings", "GrammarReport", "search_grammar", "evaluate_grammar"),
    "export": ("Exported", "export_grammar", "command_of"),
    "page": ("write_search_page", "write_evaluation_page"),
}

__all__ = [  # noqa: RUF022  # in the order of the reader's interest
    "search_grammar",
    "GrammarSettings",
    "GrammarReport",
    "evaluate_grammar",
    "Grammar",
    "export_grammar",
    "Exported",
    "command_of",
    "read_commands",
    "check_commands",
    "read_recordings",
    "read_other_speech",
    "Recording",
    "open_model",
    "CommandModel",
    "CtcModel",
    "SphinxModel",
    "learn_dictionary",
    "PronunciationDictionary",
    "candidate_expressions",
    "original_expressions",
    "CandidateSettings",
    "Expression",
    "ctc_scores",
    "compute_scores",
    "ScoreTable",
    "Decisions",
    "threshold_for",
    "Rates",
    "rates",
    "GrammarObjective",
    "ObjectiveSettings",
    "LabelledScores",
    "GrammarRates",
    "grammar_rates",
    "write_search_page",
    "write_evaluation_page",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, globals())
