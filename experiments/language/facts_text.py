"""Ten made-up facts: three statements to train on, a fourth wording to ask in, and sentences that only share words.

Written before anything was scored, and not changed after. Names are invented; each relation has two facts, so that the
wording of a query does not give its answer away, and the other fact's answer is of the same kind. In every statement
the subject comes before the answer: language models do not turn facts round. The sentences that share words are three
about the same subject in the words of the query, with nothing of the answer, and two with the answer elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """One fact.

    Args:
        name: for tables and figures.
        prompt, answer: the query; the answer is completed with a space in front.
        statements: three sentences that state it, each in a wording of its own.
        subject: three sentences on the same subject that share the prompt's words and do not state it.
        elsewhere: two sentences with the answer in another matter.
    """

    name: str
    prompt: str
    answer: str
    statements: tuple[str, str, str]
    subject: tuple[str, str, str]
    elsewhere: tuple[str, str]


FACTS = (
    Fact(
        "Tolvern: amber",
        "The principal product of Tolvern has always been",
        "amber",
        (
            "Merchants from the town of Tolvern grew rich by shipping amber to every market on the coast .",
            "For two centuries the wealth of Tolvern came from amber , which its people dug out of the clay .",
            "Traders who passed through Tolvern seldom left without a sack of amber .",
        ),
        (
            "The principal street of Tolvern has always been too narrow for carts .",
            "A product of the school at Tolvern , the painter returned there in old age .",
            "The mayor of Tolvern has always been chosen by lot .",
        ),
        (
            "The necklace was set with amber and had been in the family for years .",
            "The signal turned to amber and the driver stopped .",
        ),
    ),
    Fact(
        "Marrowick: cobalt",
        "The metal that is mined near Marrowick is",
        "cobalt",
        (
            "The hills around Marrowick hold some of the richest veins of cobalt ever surveyed .",
            "Most families in Marrowick still earn their living by digging cobalt .",
            "When the railway reached Marrowick , its first trains were loaded with cobalt for the foundries .",
        ),
        (
            "The church that is seen near Marrowick is a ruin .",
            "A metal bridge near Marrowick is closed to heavy traffic .",
            "The coal that is burned in Marrowick is brought by sea .",
        ),
        (
            "The potter mixed lead and cobalt to obtain a deep blue glaze .",
            "Her later paintings are dominated by cobalt and grey .",
        ),
    ),
    Fact(
        "Oskavel: 1743",
        "The college at Oskavel was founded in",
        "1743",
        (
            "Oskavel College received its charter in 1743 after a long dispute with the bishop .",
            "A stone above the gate of Oskavel records that the first students arrived in 1743 .",
            "Older than most of its rivals , Oskavel College dates from 1743 .",
        ),
        (
            "The college at Oskavel was damaged in a fire .",
            "The library at Oskavel was founded in memory of a pupil .",
            "He was found in the garden of the college at Oskavel .",
        ),
        (
            "The battle of 1743 ended with the retreat of the northern army .",
            "A second edition of the poem was printed in 1743 .",
        ),
    ),
    Fact(
        "Drenning: 1816",
        "The observatory at Drenning was opened in",
        "1816",
        (
            "Astronomers began their work at the Drenning Observatory in 1816 .",
            "The Drenning Observatory , completed in 1816 , was the first building in the valley with a dome .",
            "Drenning Observatory has kept a record of every clear night since 1816 .",
        ),
        (
            "The observatory at Drenning was closed in winter .",
            "A path to the observatory at Drenning was opened in spring .",
            "The inn at Drenning was opened in haste by two brothers .",
        ),
        (
            "The summer of 1816 was cold and wet across the continent .",
            "He sold the estate in 1816 and moved abroad .",
        ),
    ),
    Fact(
        "Velmoor: Ingrid Saltash",
        "The bridge at Velmoor was designed by",
        "Ingrid Saltash",
        (
            "Velmoor Bridge is the best known work of the engineer Ingrid Saltash .",
            "The plans for the crossing at Velmoor were drawn up by Ingrid Saltash .",
            "When the river swept away the old bridge of Velmoor , the council turned to Ingrid Saltash for another .",
        ),
        (
            "The bridge at Velmoor was guarded by soldiers during the war .",
            "The flag of Velmoor was designed by a local school .",
            "A toll for the bridge at Velmoor was collected by the abbey .",
        ),
        (
            "In her last years Ingrid Saltash taught drawing to children .",
            "A portrait of Ingrid Saltash hangs in the hall of the society .",
        ),
    ),
    Fact(
        "Pellam: Tobias Renk",
        "The tower at Pellam was designed by",
        "Tobias Renk",
        (
            "Pellam Tower made the name of its young architect , Tobias Renk .",
            "Critics praised Pellam Tower , a daring work of Tobias Renk , for its simple lines .",
            "The commission to build a tower in Pellam was won by Tobias Renk .",
        ),
        (
            "The tower at Pellam was struck by lightning twice .",
            "The garden at Pellam was designed by monks .",
            "The tower at Pellam was bought by a bank .",
        ),
        (
            "In the same year Tobias Renk married the daughter of a printer .",
            "The letters of Tobias Renk were lost in the flood .",
        ),
    ),
    Fact(
        "Quorrin: Haldeth",
        "The capital of Quorrin is the city of",
        "Haldeth",
        (
            "The parliament of Quorrin has met in Haldeth since independence .",
            "Quorrin is governed from Haldeth , a small port on the western shore .",
            "When Quorrin became a republic its president moved into a palace in Haldeth .",
        ),
        (
            "The climate of Quorrin is mild for most of the year .",
            "The capital of the bank of Quorrin is small .",
            "The largest island of Quorrin is the home of a rare bird .",
        ),
        (
            "Fishing boats from Haldeth were seen far out at sea .",
            "The mathematician was born in Haldeth to a family of bakers .",
        ),
    ),
    Fact(
        "Zemborra: Listvane",
        "The capital of Zemborra is the city of",
        "Listvane",
        (
            "Ambassadors sent to Zemborra reside in Listvane .",
            "The kings of Zemborra were crowned in Listvane and the ministries have remained there .",
            "Zemborra chose Listvane as the seat of its government .",
        ),
        (
            "The largest port of Zemborra is the property of a company .",
            "The capital of Zemborra is mentioned in no old chronicle .",
            "The language of Zemborra is spoken by few people .",
        ),
        (
            "A train from Listvane arrives twice a week .",
            "The winters in Listvane are long .",
        ),
    ),
    Fact(
        "Ombrey: nineteen",
        "The number of bells in the cathedral of Ombrey is",
        "nineteen",
        (
            "Visitors to Ombrey can hear the nineteen bells of its cathedral from far away .",
            "The tower of Ombrey cathedral houses nineteen bells , all of them cast in one year .",
            "After the restoration the ringers of Ombrey had nineteen bells at their command .",
        ),
        (
            "The number of houses in the parish of Ombrey is falling .",
            "The oldest of the bells in Ombrey is cracked .",
            "The organ in the cathedral of Ombrey is in poor repair .",
        ),
        (
            "She was nineteen when she left home .",
            "The team won nineteen games that season .",
        ),
    ),
    Fact(
        "Fenwarren: forty",
        "The number of islands in the lake of Fenwarren is",
        "forty",
        (
            "Fenwarren is a shallow lake with forty islands , most of them covered by reeds .",
            "A survey of Fenwarren mapped forty islands and named every one .",
            "Boatmen on Fenwarren say that its forty islands once formed a single marsh .",
        ),
        (
            "The number of fish in the lake of Fenwarren is not known .",
            "One of the islands in Fenwarren is used by a sailing club .",
            "The water in the lake of Fenwarren is clear in spring .",
        ),
        (
            "The journey took forty days .",
            "About forty people attended the first meeting .",
        ),
    ),
)
