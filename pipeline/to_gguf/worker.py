"""One GGUF file under llama.cpp, asked over pipes by `pipeline.to_gguf.llamacpp.Reader`: its metadata, its tokenizer, its logits.

    python -P pipeline/to_gguf/worker.py TOOLS FILE '{"context": 512, "threads": 2}'

A process of its own, since llama.cpp aborts where Python would raise. Run by llama.cpp's environment, so the standard
library alone is imported, and the `ctypes` declarations that belong to the library built there. A line of JSON comes in,
a line of JSON goes out; logits are raw float32.
"""

import ctypes
import json
import os
import sys
from typing import Any

BATCH = 512  # tokens in one forward pass
ERROR = 4  # ggml's log level
TEXTS = ("general.architecture", "tokenizer.chat_template", "tokenizer.ggml.model", "tokenizer.ggml.pre")
NUMBERS = (
    "block_count",
    "context_length",
    "embedding_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
)


def main() -> None:
    tools, file, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    os.environ["LLAMA_CPP_LIB_PATH"] = f"{tools}/bin"
    sys.path.insert(0, f"{tools}/python")
    from llama_cpp import llama_cpp as api  # type: ignore[import-not-found]

    log = api.llama_log_callback(_only_errors)  # a name of its own: ctypes does not keep it alive
    api.llama_log_set(log, None)
    api.llama_backend_init()
    Worker(api, file, **options).serve()


def _only_errors(level: int, text: bytes, _: Any) -> None:
    if level == ERROR:
        sys.stderr.buffer.write(text)
        sys.stderr.flush()


class Worker:
    def __init__(self, api: Any, file: str, context: int | None, threads: int, pre: str | None) -> None:
        """`context`: tokens; None loads no weights. `pre`: the pre-tokenizer in place of the one the file names."""
        self.api, self.out = api, sys.stdout.buffer
        parameters = api.llama_model_default_params()
        parameters.vocab_only = context is None
        parameters.n_gpu_layers = 0
        if pre:
            overrides = (api.llama_model_kv_override * 2)()  # an empty key ends them
            overrides[0].tag = api.LLAMA_KV_OVERRIDE_TYPE_STR
            overrides[0].key = b"tokenizer.ggml.pre"
            overrides[0].value.val_str = pre.encode()
            parameters.kv_overrides = overrides
        self.model = api.llama_model_load_from_file(file.encode(), parameters)
        if not self.model:
            sys.exit(f"llama.cpp cannot load {file}")
        self.vocabulary = api.llama_model_get_vocab(self.model)
        self.tokens = int(api.llama_vocab_n_tokens(self.vocabulary))
        if context is None:
            return
        shape = api.llama_context_default_params()
        shape.n_ctx, shape.n_batch, shape.n_ubatch = context, BATCH, BATCH
        shape.n_threads = shape.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, shape)
        if not self.context:
            sys.exit(f"llama.cpp makes no context of {context} tokens for {file}")
        self.batch = api.llama_batch_init(BATCH, 0, 1)

    def serve(self) -> None:
        self.answer(self.facts())
        for line in sys.stdin:
            asked = json.loads(line)
            if "texts" in asked:
                self.answer([self.tokenized(text.encode(), asked["special"]) for text in asked["texts"]])
            else:
                self.write_logits(asked["tokens"], set(asked["positions"]))
                self.out.flush()

    def answer(self, value: Any) -> None:
        self.out.write(json.dumps(value).encode() + b"\n")
        self.out.flush()

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = {key: self.metadata(key) for key in TEXTS}
        for key in NUMBERS:
            value = self.metadata(f"{found['general.architecture']}.{key}")
            found[key] = int(value) if value and value.isdigit() else None  # some architectures have one a layer
        ends = [token for token in range(self.tokens) if self.api.llama_vocab_is_eog(self.vocabulary, token)]
        return found | {"vocabulary": self.tokens, "ends": ends}

    def metadata(self, key: str) -> str | None:
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self.api.llama_model_meta_val_str(self.model, key.encode(), buffer, size)
            if length < size:
                return buffer.value.decode() if length >= 0 else None
            size = length + 1

    def tokenized(self, text: bytes, special: bool) -> list[int]:
        room = len(text) + 8
        found = (ctypes.c_int32 * room)()
        count = self.api.llama_tokenize(self.vocabulary, text, len(text), found, room, special, True)
        return list(found[:count])

    def write_logits(self, tokens: list[int], positions: set[int]) -> None:
        """`(positions, vocabulary)` float32, in the order of the tokens. Nothing is kept of what was asked before."""
        api, batch = self.api, self.batch
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            batch.n_tokens = len(part)
            for place, token in enumerate(part):
                batch.token[place], batch.pos[place] = token, start + place
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
                batch.logits[place] = start + place in positions
            if code := api.llama_decode(self.context, batch):
                sys.exit(f"llama.cpp fails with code {code} at token {start} of {len(tokens)}")
            for place in range(len(part)):
                if start + place in positions:
                    row = api.llama_get_logits_ith(self.context, place)
                    self.out.write(ctypes.string_at(row, 4 * self.tokens))


if __name__ == "__main__":
    main()
