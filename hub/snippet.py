# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The example in a card, which loads a model and generates with it."""

import json
from pathlib import Path

from ..configuration_loopmdm import LoopMDMConfig
from ..data import adapter_base
from ..data.pretrained import TOKENIZER_FILES
from ..weight_files import read_json

_PLAIN = """\
inputs = tokenizer("Write what comes before the answer here", return_tensors="pt")
"""
_CHAT = """\
messages = [{"role": "user", "content": "Write your question here"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
"""


def loading_snippet(folder: Path, name: str, config: LoopMDMConfig, most_loops: int) -> str:
    """Markdown with Python code that loads `name`, a folder or Hub id, and generates."""
    settings = read_json(folder / "generation_config.json")
    loops = min(settings.get("num_loops") or config.num_loops, most_loops)
    is_adapter = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    new_tokens = min(64, config.max_position_embeddings // 2)
    own = any((folder / file).is_file() for file in TOKENIZER_FILES)
    tokenizer = name if own or not is_adapter else adapter_base(str(folder))
    has_chat = (folder / "chat_template.jinja").is_file() or bool(
        read_json(folder / "tokenizer_config.json").get("chat_template")
    )
    if is_adapter:
        code = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
        code += f"model = AutoPeftModelForCausalLM.from_pretrained({json.dumps(name)}, trust_remote_code=True)\n"
    else:
        code = "from transformers import AutoModel, AutoTokenizer\n\n"
        code += f"model = AutoModel.from_pretrained({json.dumps(name)}, trust_remote_code=True)\n"
    generate = f"num_loops={loops})  # any number: 1 is the model without loops\n"
    if own or is_adapter:
        code += f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(tokenizer)}, trust_remote_code=True)\n\n"
        code += _CHAT if has_chat else _PLAIN
        code += f"output = model.generate(**inputs, max_new_tokens={new_tokens}, {generate}"
        code += 'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))\n'
    else:
        code = "import torch\n" + code.replace(", AutoTokenizer", "")
        code += (
            f"\ntokens = torch.full((1, {new_tokens}), model.config.mask_token_id)  # this model has no tokenizer\n"
        )
        code += f"print(model.generate(tokens, max_new_tokens=0, {generate.replace(')', '))', 1)}"
    return (
        f"## Use\n\n```python\n{code}```\n\n`trust_remote_code=True` runs the Python files of "
        f"{'the base model' if is_adapter else 'this repository'}; after `import loopmdm` it is not needed.\n"
    )
