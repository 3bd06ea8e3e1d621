"""How a model is used: a few lines of Python that run as they stand, and what they rest on."""

import json
from collections.abc import Iterator

from aletheia.exp.exporters.model import Model


def snippet(model: Model) -> str:
    """Runs as it stands from the workspace's root."""
    record = model.record
    trust = ", trust_remote_code=True" if record.facts.configuration.get("trust_remote_code") else ""
    load = f'dtype="auto", device_map="auto"{trust}'
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"path = {json.dumps(record.workspace.shown(model.folder))}  # or the name it is published under",
        f"tokenizer = AutoTokenizer.from_pretrained(path{trust})",
    ]
    if not model.is_adapter:
        lines.append(f"model = AutoModelForCausalLM.from_pretrained(path, {load})")
    elif model.base_on_hub:
        lines[0:0] = ["from peft import PeftModel"]
        source = f"{json.dumps(model.base_on_hub)}, revision={json.dumps(str(model.base['revision']))}"
        lines += [
            f"base = AutoModelForCausalLM.from_pretrained({source}, {load})",
            "model = PeftModel.from_pretrained(base, path)",
        ]
    else:
        lines[0:0] = ["from peft import PeftConfig, PeftModel"]
        lines += [
            "source = PeftConfig.from_pretrained(path).base_model_name_or_path  # where the base lay when it was trained",
            f"base = AutoModelForCausalLM.from_pretrained(source, {load})",
            "model = PeftModel.from_pretrained(base, path)",
        ]
    contract = model.contract
    stop = f", eos_token_id={json.dumps(contract.end_of_turn_id)}" if contract else ""
    return "\n".join(
        [
            *lines,
            "",
            'messages = [{"role": "user", "content": "How do I find out why a query is slow?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ").to(model.device)",
            f"output = model.generate(**inputs, max_new_tokens=256{stop})",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )


def remarks(model: Model) -> Iterator[str]:
    """What one must know to change the snippet."""
    contract = model.contract
    if contract:
        stop = f"{contract.end_of_turn} (token {contract.end_of_turn_id})"
        yield f"It was trained to end its turn with {stop}; without that stop it runs on."
        yield f"Prompts must go through the chat template beside the weights, whose contract is {contract.sha256}."
    else:
        yield "Its chat contract is not at hand, so the token that ends its turn cannot be named here."
    if model.is_adapter:
        yield "The adapter's weights are float32 and are added to the base as it is stored; on another base they mean nothing."
