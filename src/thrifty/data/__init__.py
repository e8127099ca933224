"""Rows from files and hub ids, the chat template, labels on the answers, batches.

`load` reads sources into `Example`s, `encode_all` turns them into ids and labels, `pack` joins rows, and `collate`
makes batches. What is
trained is told in `encode`, the plain form of a conversation where a tokenizer has no chat template in `template`.
Importing this room does not import torch: a mistake in a run file is told at once.
"""

from thrifty.data.collate import collate
from thrifty.data.encode import (
    DataReport,
    Encoded,
    chat_prompt,
    check_vocabulary,
    encode,
    encode_all,
    encode_options,
    encoded_rows,
    nothing_trained,
    prompt_and_reference,
    report_of,
    stop_ids,
)
from thrifty.data.pack import PackedRows, pack
from thrifty.data.preferences import CONVERTERS, Judged, one_form
from thrifty.data.shapes import Example, answer, shape_of, with_answer
from thrifty.data.source import Source, examples_in, load
from thrifty.data.template import chat_template
from thrifty.data.units import units
from thrifty.data.windows import windows

__all__ = [
    "CONVERTERS",
    "DataReport",
    "Encoded",
    "Example",
    "Judged",
    "PackedRows",
    "Source",
    "answer",
    "chat_prompt",
    "chat_template",
    "check_vocabulary",
    "collate",
    "encode",
    "encode_all",
    "encode_options",
    "encoded_rows",
    "examples_in",
    "load",
    "nothing_trained",
    "one_form",
    "pack",
    "prompt_and_reference",
    "report_of",
    "shape_of",
    "stop_ids",
    "units",
    "windows",
    "with_answer",
]
