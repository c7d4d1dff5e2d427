"""Assignment iq_task (chapter 6): a task that memory cannot answer, and its solver.

Read tutorials/06-iq.md, sections 6.1 to 6.3; FLM-101B, section 5.
Grade it: python -m course.grade iq_task

The task: keep the last k letters. A prompt shows three examples and asks for a fourth:

    Input: abcdda
    Output: dda
    Input: bbacd
    Output: acd
    Input: dcbaabcd
    Output: bcd
    Input: cabbad
    Output:

The answer here is "bad". k is 2, 3 or 4: the same for the whole prompt, and different from prompt
to prompt. Nobody says it: it has to be found in the examples.
"""


def make_item(seed: int, split: str) -> tuple[str, str]:
    """One item: (prompt, answer). The prompt ends with "Output:", without a space or a line end.

    split: "train" or "eval". The same seed and split always give the same item, whatever was made
    before; another seed gives another item.

    The four inputs are different words of 5 to 9 letters, each letter one of a, b, c and d; words
    of every length are asked for. Only one rule may fit: the number of letters that are cut OFF
    must not be the same in all three examples.

    No word that occurs as an input in a "train" prompt may be asked for (be the fourth input) in
    any "eval" prompt, whatever the seeds. So the word itself must decide on which side it is, for
    example by a hash of it (hashlib; Python's own `hash` of a text differs from process to
    process). About half of the words should be on each side.
    """
    raise NotImplementedError


def solve(prompt: str) -> str:
    """The answer to a prompt of this form, read from its text alone, without a space before it."""
    raise NotImplementedError
