"""Judges that are models of transformers which see: a Likert scale on two clips, and VideoScore2 on each.

Weights are looked for on this machine alone. A score is the mean of 1 to 5 under the probabilities that the model gives
these digits, so that every answer has one, and small preferences are not lost to rounding.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from dit_accel_pipelines.generation.loading import pick_device

from dit_accel import ConfigError

from .contract import Question, ShownClip

DIGITS, VIDEOSCORE2 = "12345", "TIGER-Lab/VideoScore2"
RUBRIC = (
    "Score each clip from 1 to 5: 1 is a failure, 2 has grave flaws, 3 is passable, 4 has small flaws only, 5 is "
    "without a flaw. Answer with the two scores alone."
)

LIKERT = {
    "subject": "Do the main figures keep their shape, colour and identity?",
    "scene": "Does the surroundings' form stay firm, without warping or melting?",
    "motion": "Is the motion even, without jumps or stutter?",
    "flicker": "Is the clip free of flashes and of sudden changes in brightness?",
    "dynamics": "Does the clip really move as its prompt says, rather than stand still?",
    "prompt": "Does the clip show all that its prompt says?",
}
"""The questions where none are named, after dimensions of WorldJen (arXiv 2605.03475)."""

THINKING = 1024  # tokens at most that VideoScore2 thinks in


class VisionModel:
    """A model that answers in text to pictures or a video, from a folder or the hub's cache."""

    def __init__(self, source: str, device: str | None) -> None:
        from huggingface_hub import snapshot_download
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.device = pick_device(device)
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        try:
            path = source if Path(source).is_dir() else snapshot_download(source, local_files_only=True)
            self.processor: Any = AutoProcessor.from_pretrained(path, local_files_only=True)
            model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
            raise ConfigError(f"judge {source} can't be loaded ({reason}); fetch it: hf download {source}") from None
        self.model: Any = model.to(self.device).eval()

    def inputs(self, content: list[dict[str, str]], stem: str, **seen: Any) -> Any:
        """Return what the model takes of a message, pictures or a video, and the answer's beginning."""
        message = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return self.processor(text=[text + stem], return_tensors="pt", **seen).to(self.device)

    @torch.inference_mode()
    def score(self, content: list[dict[str, str]], stem: str, **seen: Any) -> float:
        """Return the mean of the digits 1 to 5 that may follow an answer's beginning."""
        encode = self.processor.tokenizer.encode
        ends = [encode(stem + digit, add_special_tokens=False) for digit in DIGITS]
        if len({tuple(tokens[:-1]) for tokens in ends}) > 1 or len({tokens[-1] for tokens in ends}) < len(DIGITS):
            raise ConfigError(f"the judge's tokenizer has no token for each digit behind {stem[-20:]!r}; take another")
        stem_ids = ends[0][:-1]
        inputs = self.inputs(content, self.processor.tokenizer.decode(stem_ids), **seen)
        logits = self.model(**inputs).logits[0, -1, [tokens[-1] for tokens in ends]].float()
        return float(logits.softmax(-1) @ torch.arange(1.0, 6.0, device=logits.device))


class LikertJudge:
    """A model that sees the frames of both clips, and scores each from 1 to 5 by a question.

    In the manner of WorldJen (arXiv 2605.03475), which shows one clip and reads a digit; two tell small differences.
    """

    def __init__(self, source: str, device: str | None = None) -> None:
        self.name, self.questions = f"likert={source}", tuple(LIKERT.values())
        self.model = VisionModel(source, device)

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[float, float]]:
        """Give the scores of the first clip and, once that is said, of the second."""
        return map(self._answer, questions)

    def _answer(self, question: Question) -> tuple[float, float]:
        pictures, content = [], [{"type": "text", "text": f"Two clips were made for this prompt: {question.prompt}"}]
        for number, clip in enumerate((question.first, question.second), 1):
            pictures += (frames := list(clip.frames()))
            content += [{"type": "text", "text": f"\nClip {number}: "}, *[{"type": "image"}] * len(frames)]
        content += [{"type": "text", "text": f"\n{question.question} {RUBRIC}"}]
        first = self.model.score(content, stem := "Clip 1: ", images=pictures)
        return first, self.model.score(content, f"{stem}{round(first)}\nClip 2: ", images=pictures)


class VideoScore2Judge:
    """VideoScore2 (arXiv 2509.22799): thinks about one clip, then scores it in three dimensions, each from 1 to 5.

    The original writes its scores and reads them back; here each is the mean of the digits after its own thoughts. A
    clip is seen by itself, so that it has the same score in both orders.
    """

    questions = ("visual quality", "text-to-video alignment", "physical/common-sense consistency")

    def __init__(self, source: str = "", device: str | None = None) -> None:
        self.name, self.model = "videoscore2", VisionModel(source or VIDEOSCORE2, device)
        self._known: dict[tuple[ShownClip, str], dict[str, float]] = {}

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[float, float]]:
        """Give both clips' scores in the dimension that a question names."""
        for question in questions:
            if question.question not in self.questions:
                raise ConfigError(f"videoscore2 scores {', '.join(self.questions)}, got {question.question!r}")
        for question in questions:
            first, second = (self._scored(clip, question.prompt) for clip in (question.first, question.second))
            yield first[question.question], second[question.question]

    @torch.inference_mode()
    def _scored(self, clip: ShownClip, prompt: str) -> dict[str, float]:
        if (clip, prompt) in self._known:
            return self._known[clip, prompt]
        model, frames = self.model, clip.frames()
        about = {"total_num_frames": len(frames), "frames_indices": list(range(len(frames))), "fps": clip.fps}
        seen = {"videos": [frames], "do_sample_frames": False, "video_metadata": [about]}
        heads = "\n".join(f"{name}: <score>" for name in self.questions)
        text = f"You judge videos that a model made. Score this one from 1 to 5 in three dimensions: {heads}\nIts "
        text += f"prompt: {prompt}\nThink first, and end with the three lines."
        content = [{"type": "video"}, {"type": "text", "text": text}]
        inputs = model.inputs(content, "", **seen)
        tokens = model.model.generate(**inputs, max_new_tokens=THINKING, do_sample=False)
        written = tokens[0, inputs["input_ids"].shape[1] :]
        thoughts = model.processor.tokenizer.decode(written, skip_special_tokens=True)
        stem = thoughts.rpartition(f"{self.questions[0]}:")[0] or f"{thoughts}\n"
        scores = self._known[clip, prompt] = {}
        for name in self.questions:
            stem += f"{name}: "
            scores[name] = model.score(content, stem, **seen)
            stem += f"{round(scores[name])}\n"
        return scores
