"""What the teacher is asked when text is sampled from it: topics of many fields, and ways to open and to go on."""

from __future__ import annotations

__all__ = ["FOLLOW_UPS", "OPENINGS", "QUESTIONS", "TOPICS"]

TOPICS = tuple(
    " ".join(line.split())
    for group in (
        # nature and science
        """the water cycle; photosynthesis; volcanoes; the moons of Jupiter; how vaccines work; plate tectonics; coral
        reefs; black holes; the periodic table; antibiotics and resistance; migration of birds; the human heart;
        evolution of whales; why the sky is blue; the ozone layer; earthquakes; the immune system; genetics and
        inheritance; bees and pollination; the speed of light; sleep and dreams; the Great Barrier Reef; rainforests;
        glaciers; deep-sea life; mushrooms; the life of a star; nuclear energy; electricity and magnetism; the
        discovery of penicillin; dinosaurs; the scientific method; memory and the brain; nutrition and vitamins; the
        carbon cycle; tides; wolves; elephants; spiders; deserts""",
        # history and society
        """the Roman Empire; the French Revolution; the invention of printing; ancient Egypt; the Silk Road; the
        Industrial Revolution; the fall of the Berlin Wall; the Black Death; the Renaissance; Marie Curie; Leonardo da
        Vinci; the First World War; the history of tea; the Olympic Games; the Great Wall of China; the Aztecs;
        Vikings; the American Civil War; women's suffrage; the printing of money; the history of writing; the Ottoman
        Empire; Alexander the Great; the Magna Carta; the United Nations; democracy in Athens; the space race; castles;
        the age of exploration; Mahatma Gandhi; Abraham Lincoln; the history of medicine; the Library of Alexandria;
        railways; the Cold War""",
        # places
        """Paris; Tokyo; the Sahara; the Amazon river; Iceland; New Zealand; Kenya; Venice; the Himalayas; Brazil;
        Scotland; the Mediterranean Sea; Antarctica; India; Canada; Istanbul; Mexico City; Norway; the Nile; San
        Francisco""",
        # art and letters
        """Shakespeare's tragedies; writing a short story; the structure of a sonnet; jazz; Beethoven; impressionist
        painting; film noir; the novel; photography; architecture of cathedrals; fairy tales; Greek mythology; poetry
        about autumn; detective stories; opera; theatre; science fiction; folk music; the art of translation; a letter
        to an old friend""",
        # mathematics, computing, engineering
        """prime numbers; the Pythagorean theorem; probability and dice; sorting algorithms; how a computer stores
        numbers; neural networks; the internet; encryption; databases; operating systems; writing a Python function;
        recursion; debugging a program; bridges; aeroplanes; batteries; solar panels; robots; clocks; maps and
        navigation; statistics; percentages and interest; geometry of circles; open-source software; computer viruses;
        programming languages""",
        # everyday life and work
        """baking bread; growing tomatoes; a healthy breakfast; learning a language; managing time; saving money; job
        interviews; public speaking; first aid; caring for a cat; training a dog; running a marathon; yoga; cycling in a
        city; packing for a journey; making soup; coffee; chess; football; gardening in a small space; repairing a
        bicycle; choosing a book; writing an email; being a good neighbour; raising children; dealing with stress; a
        job in a hospital; starting a small business; teaching mathematics; a day at the beach; camping; cleaning a
        kitchen; recipes with lentils; birthday parties; choosing a computer; volunteering; public libraries;
        recycling; winter holidays""",
        # ideas
        """justice; friendship; free will; the meaning of happiness; artificial intelligence and society; honesty; the
        ethics of animals; stoicism; democracy and voting; privacy; climate change; inequality; education for all;
        economics of supply and demand; inflation; human rights; curiosity; courage; the scientific revolution;
        tradition and change""",
    )
    for line in group.split(";")
)

QUESTIONS = (
    "Tell me about {topic}.",
    "What should everyone know about {topic}?",
    "Write an essay about {topic}.",
    "Write a long and detailed article about {topic}.",
    "Explain {topic} to a child.",
    "Give me ten facts about {topic}.",
    "What are the most common questions about {topic}? Answer them.",
    "Write a story that has to do with {topic}.",
    "Write a dialogue between two friends about {topic}.",
    "Summarize the history of {topic}.",
    "Why does {topic} matter today?",
    "Compare two different views of {topic}.",
    "I have to give a talk on {topic}. Write it for me.",
    "Give me step-by-step advice about {topic}.",
)

FOLLOW_UPS = (
    "Tell me more.",
    "Go on.",
    "Can you give an example?",
    "Explain that in more detail.",
    "What else is there to say about {topic}?",
    "Write a summary of what you have said.",
    "What do people often get wrong about {topic}?",
    "Who are the most important people in this?",
    "Write a short story about {topic}.",
    "How did this change over time?",
    "What is the opposite view?",
    "Now write a poem about it.",
)

OPENINGS = (
    "{topic}\n\n",
    "This article is about {topic}.",
    "In this chapter we look at {topic}.",
    "The first thing to understand about {topic} is",
    "Question: What is the most important thing about {topic}?\nAnswer:",
    "It was a cold morning, and she was thinking about {topic}.",
    "= {topic} =\n\n",
)
