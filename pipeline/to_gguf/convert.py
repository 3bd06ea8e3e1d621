"""llama.cpp's own converter, told two things: the pre-tokenizer where it knows none, and the end-of-turn.

    python -P pipeline/to_gguf/convert.py TOOLS PRE END_OF_TURN_ID MODEL --outtype f16 --outfile FILE

It names a BPE pre-tokenizer by the hash of one text's token ids, so it stops at a tokenizer of one's own. PRE is put in
its place; empty: what the converter finds, else GPT-2's, which says so. Which one splits as the tokenizer does is found
and proven by `pipeline.export`. The end-of-turn is written as such, since a model may end its turns with another token
than eos. Run in this environment, which has torch and transformers; a program of its own, for it is a script that ends
its process.
"""

import sys
from typing import Any

UNKNOWN = "its pre-tokenizer is not known"


def main() -> None:
    tools, pre, end_of_turn, *arguments = sys.argv[1:]
    sys.path.insert(0, tools)
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    import convert_hf_to_gguf as converter  # type: ignore[import-not-found]  # puts llama.cpp's gguf on the path
    from conversion.base import TextModel  # type: ignore[import-not-found]
    from gguf import SpecialVocab  # type: ignore[import-not-found]

    by_hash, add_to_gguf = TextModel.get_vocab_base_pre, SpecialVocab.add_to_gguf
    of_sentencepiece = TextModel._create_vocab_sentencepiece

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        if pre:
            return pre
        try:
            return str(by_hash(self, tokenizer))
        except NotImplementedError:
            print(UNKNOWN, flush=True)
            return "gpt-2"

    def add_with_end_of_turn(self: Any, *arguments: Any, **options: Any) -> None:
        self.special_token_ids["eot"] = int(end_of_turn)
        add_to_gguf(self, *arguments, **options)

    def create_vocab_sentencepiece(self: Any) -> Any:
        """It imports sentencepiece before it looks whether there is anything for it to read."""
        if not (self.dir_model / "tokenizer.model").is_file():
            raise FileNotFoundError("tokenizer.model")
        return of_sentencepiece(self)

    TextModel.get_vocab_base_pre = get_vocab_base_pre
    TextModel._create_vocab_sentencepiece = create_vocab_sentencepiece
    SpecialVocab.add_to_gguf = add_with_end_of_turn
    converter.main()


if __name__ == "__main__":
    main()
