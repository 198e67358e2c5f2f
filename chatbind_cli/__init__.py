"""ChatBind: let a language model talk about whatever ImageBind can perceive."""

__version__ = "0.1.0"
