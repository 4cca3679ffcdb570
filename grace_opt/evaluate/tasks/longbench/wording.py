"""How each of LongBench's tasks asks: what stands before and after the context, the metric, the tokens to generate.

Order, parts, metrics, tokens and which tasks take no chat template are the published ones; the words are our own. A
copy that has questions and answer prefixes of its own, such as the one on the hub, keeps those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from grace_opt.evaluate.tasks.longbench import metrics
from grace_opt.evaluate.tasks.longbench.metrics import Metric


@dataclass(frozen=True)
class Wording:
    """One task.

    Attributes:
        before, after: of the context; ``{input}`` is the row's input, which follows.
        metric: of one text against one answer; the best answer counts.
        new_tokens: that are generated at most.
        prefix: how the prompt begins the answer.
        plain: never in a chat template.
        one_line: only the first line of a text counts, as for tasks that show examples.
    """

    before: str
    after: str
    metric: Metric
    new_tokens: int
    prefix: str = ""
    plain: bool = False
    one_line: bool = False

    def asked(self, given: str) -> str:
        """What follows the context."""
        return self.after.replace("{input}", given)


SHORTLY = "Answer with the answer alone, in as few words as you can, without an explanation."
ARTICLE = (
    f'{SHORTLY} If the article does not say it, write "unanswerable"; to a question of yes or no, write "yes", "no" or '
    '"unanswerable".'
)
PASSAGES = "Answer the question from these passages. Write the answer alone."
IN_CHINESE = "\u95ee\u9898\uff1a{input}"  # question:
ANSWER_ZH = "\n\u56de\u7b54\uff1a"  # answer:


def _passages() -> Wording:
    before = f"{PASSAGES}\n\nThe passages:\n"
    return Wording(before, f"\n\n{PASSAGES}\n\nQuestion: {{input}}", metrics.qa_f1, 32, "\nAnswer:")


def _shown(before: str, metric: Metric, new_tokens: int, after: str = "\n\n{input}") -> Wording:
    """Tasks with examples; the row's input ends with the beginning of the answer."""
    return Wording(f"{before}\n\n", after, metric, new_tokens, plain=True, one_line=True)


def _summary(of: str, ask: str) -> Wording:
    return Wording(f"{ask}\n\n{of}:\n", f"\n\n{ask}", metrics.rouge_l, 512, "\n\nSummary:")


WORDING: Mapping[str, Wording] = {
    "narrativeqa": Wording(
        f"Below are a story, which is a novel or a film script, and a question on it. {SHORTLY}\n\nStory: ",
        f"\n\nNow answer the question on the story. {SHORTLY}\n\nQuestion: {{input}}",
        metrics.qa_f1,
        128,
        "\n\nAnswer:",
    ),
    "qasper": Wording(
        f"Below are a scientific article and a question on it. {ARTICLE}\n\nArticle: ",
        f"\n\nAnswer the question on the article above. {ARTICLE}\n\nQuestion: {{input}}",
        metrics.qa_f1,
        128,
        "\n\nAnswer:",
    ),
    "multifieldqa_en": Wording(
        "Read the text below and give a short answer.\n\n",
        "\n\nNow answer the question on the text above; write the answer alone.\n\nQuestion: {input}",
        metrics.qa_f1,
        64,
        "\nAnswer:",
    ),
    "multifieldqa_zh": Wording(
        "\u8bf7\u9605\u8bfb\u4e0b\u9762\u7684\u6587\u5b57\uff0c\u5e76\u7528\u4e2d\u6587\u7b80\u77ed\u56de\u7b54\u3002\n\n",
        f"\n\n\u8bf7\u6839\u636e\u4e0a\u6587\u56de\u7b54\u4e0b\u9762\u7684\u95ee\u9898\uff0c\u53ea\u5199\u7b54\u6848\u3002\n\n{IN_CHINESE}",
        metrics.qa_f1_zh,
        64,
        ANSWER_ZH,
    ),
    "hotpotqa": _passages(),
    "2wikimqa": _passages(),
    "musique": _passages(),
    "dureader": Wording(
        "\u8bf7\u6839\u636e\u6240\u7ed9\u7684\u6587\u7ae0\u56de\u7b54\u95ee\u9898\u3002\n\n\u6587\u7ae0\uff1a",
        f"\n\n\u8bf7\u6839\u636e\u4e0a\u9762\u7684\u6587\u7ae0\u56de\u7b54\u3002\n\n{IN_CHINESE}",
        metrics.rouge_l_zh,
        128,
        ANSWER_ZH,
    ),
    "gov_report": _summary("Report", "Summarise this report of a government agency on one page."),
    "qmsum": Wording(
        "Below are the transcript of a meeting and a query on it. Answer it in one or more sentences.\n\nTranscript:\n",
        "\n\nNow answer the query on the meeting in one or more sentences.\n\nQuery: {input}",
        metrics.rouge_l,
        512,
        "\nAnswer:",
    ),
    "multi_news": _summary("News", "Summarise all of these news articles together on one page."),
    "vcsum": Wording(
        "\u8bf7\u9605\u8bfb\u4e0b\u9762\u7684\u4f1a\u8bae\u8bb0\u5f55\uff0c\u7136\u540e\u603b\u7ed3\u4f1a\u8bae\u5185\u5bb9\u3002\n\u4f1a\u8bae\u8bb0\u5f55\uff1a\n",
        "",
        metrics.rouge_l_zh,
        512,
        "\n\n\u4f1a\u8bae\u603b\u7ed3\uff1a",
    ),
    "trec": _shown(
        "Say of which type the last question is, after these examples.", metrics.classification, 64, "\n{input}"
    ),
    "triviaqa": _shown(
        "Answer the question from the passage, with the answer alone, after these examples.", metrics.qa_f1, 32
    ),
    "samsum": _shown("Summarise the dialogue in a few short sentences, after these examples.", metrics.rouge_l, 128),
    "lsht": _shown(
        "\u8bf7\u5224\u65ad\u6700\u540e\u4e00\u6761\u65b0\u95fb\u7684\u7c7b\u522b\uff0c\u4e0b\u9762\u662f\u793a\u4f8b\u3002",
        metrics.classification,
        64,
        "\n{input}",
    ),
    "passage_count": Wording(
        "Below are paragraphs of Wikipedia, some of them more than once. Read them and find out how many different "
        "ones there are.\n\n",
        "\n\nHow many different paragraphs are there? Write the number alone, such as 1, 2 or 3.",
        metrics.count,
        32,
        "\n\nThe number is:",
    ),
    "passage_retrieval_en": Wording(
        "Below are 30 paragraphs of Wikipedia and an abstract of one of them. Find out of which.\n\n",
        '\n\nThe abstract:\n\n{input}\n\nOf which paragraph is it? Write "Paragraph 1", "Paragraph 2" and so on.',
        metrics.retrieval,
        32,
        "\n\nThe answer is:",
    ),
    "passage_retrieval_zh": Wording(
        "\u4e0b\u9762\u6709\u82e5\u5e72\u6bb5\u843d\uff0c\u4ee5\u53ca\u5176\u4e2d\u4e00\u6bb5\u7684\u6458\u8981\u3002\u8bf7\u627e\u51fa\u6458\u8981\u6240\u5c5e\u7684\u6bb5\u843d\u3002\n\n",
        "\n\n\u6458\u8981\uff1a\n\n{input}\n\n\u5b83\u51fa\u81ea\u54ea\u4e00\u6bb5\uff1f\u8bf7\u5199\u201c\u6bb5\u843d1\u201d\u3001\u201c\u6bb5\u843d2\u201d\u7b49\u3002",
        metrics.retrieval,
        32,
        "\n\n\u7b54\u6848\u662f\uff1a",
    ),
    "lcc": Wording("Complete the code below.\n", "Next line:\n", metrics.code_similarity, 64, plain=True),
    "repobench-p": Wording(
        "Complete the code below.\n", "{input}Next line:\n", metrics.code_similarity, 64, plain=True
    ),
}

#: the tasks of LongBench-E, whose rows are spread evenly over three ranges of length
EVEN = (
    *("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum"),
    *("passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
)
