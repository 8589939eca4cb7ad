"""Conversations with a model."""

from gptjax.chat.conversation import Conversation

__all__ = ["Conversation"]
