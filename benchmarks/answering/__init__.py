"""The parts of `answer.py`: the questions, and the ways to answer them."""
