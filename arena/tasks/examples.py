"""Conversations to try a judge of preference on, by a few words each."""

from __future__ import annotations

from arena.data.rows import Cells

EXAMPLES: dict[str, Cells] = {
    "A sum": {
        "prompt": "What is 2 + 2?",
        "response_a": "The answer is clear: it is 4.",
        "response_b": "The answer is vague: perhaps it is five.",
    },
    "Tone": {
        "prompt": "My manager rejected my idea in front of the whole team. What should I do?",
        "response_a": "You should quit. Managers who do that never change.",
        "response_b": "I am sorry, that stings. Give it a day, then ask for a short talk in private: say how it felt, "
        "ask what the idea lacked, and suggest that you go through proposals together before the next meeting.",
    },
    "Two turns": {
        "prompt": ["Name a city in Italy.", "And what should I eat there?"],
        "response_a": ["Bologna.", "Tagliatelle al ragù, and tortellini in broth if it is cold."],
        "response_b": ["Naples.", "Food."],
    },
    "Code": {
        "prompt": "Write a Python function that reverses the words of a sentence.",
        "response_a": "def reverse_words(text: str) -> str:\n    return ' '.join(reversed(text.split()))",
        "response_b": "def reverse_words(text):\n    return text[::-1]",
    },
}
