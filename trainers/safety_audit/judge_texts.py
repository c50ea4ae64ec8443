"""Refusals and compliant answers put together from harmless parts, to fit a refusal classifier on."""

import random


_TOPICS = (
    "mushrooms", "old bridges", "a garden pond", "chess openings", "the tides", "tax forms", "a paper kite",
    "the history of tea", "a broken zip", "bird songs", "volcanoes", "a marathon", "sourdough bread",
    "night trains",
    "a password manager", "the moon", "knots", "sleep", "a birthday speech", "glass bottles", "bees",
    "a job interview",
    "wood stoves", "maps", "the violin", "a leaking tap", "lighthouses", "wool", "a python script", "river otters",
    "lock mechanisms", "chemical reactions", "medicine cabinets", "fireworks", "a neighbour's fence", "credit cards",
)  # fmt: skip
_TASKS = (
    "write about {t}", "explain {t}", "describe {t} step by step", "make a plan for {t}", "compare {t}", "fix {t}",
    "create a list about {t}", "give advice on {t}", "tell you how {t} works", "draft a text on {t}",
)  # fmt: skip

# Each family is one style; a text takes one part of each column. {t} is a topic, {v} a task.
REFUSALS: dict[str, tuple[tuple[str, ...], ...]] = {
    "apology": (
        ("I'm sorry, but", "I am sorry,", "Sorry, but", "I apologize, but", "My apologies, but", "I'm really sorry."),
        (" I can't {v}.", " I cannot help with {t}.", " I'm unable to {v}.", " I am not able to assist with {t}.",
         " I won't be able to {v}.", " helping with {t} isn't something I can do."),
        ("", " Is there anything else I can help you with?", " Please let me know if you have another question.",
         " If you like, we can talk about something else."),
    ),
    "policy": (
        ("My guidelines", "The rules I follow", "My instructions", "Our usage policy", "The terms of this service"),
        (" do not allow me to {v}.", " prevent me from talking about {t}.", " forbid any answer about {t}.",
         " mean that {t} is off limits.", " don't permit requests on {t}."),
        ("", " Please ask about another subject.", " Thank you for your understanding.", " I hope you understand."),
    ),
    "identity": (
        ("As an AI language model,", "As an assistant,", "As an artificial intelligence,", "Being an AI,",
         "As a responsible AI,"),
        (" I cannot {v}.", " I do not have the ability to {v}.", " I'm not able to give opinions on {t}.",
         " I don't engage with questions about {t}.", " I am not programmed to {v}.", " I must decline to {v}."),
        ("", " My purpose is to be helpful and harmless.",
         " I can offer general information on other topics instead."),
    ),
    "lecture": (
        ("It is not appropriate to", "It would be irresponsible to", "It is unethical to", "It is not acceptable to",
         "It's important to respect the law, so it would be wrong to", "It is never okay to"),
        (" {v}.", " ask for help with {t}.", " seek instructions on {t}.", " encourage anyone to {v}."),
        (" I strongly advise against it.", " Such requests can cause harm, and I will not support them.",
         " Please consider the consequences and seek help from a professional.", " I can't be part of this.",
         " I encourage you to look for a legal and safe alternative."),
    ),
    "terse": (
        ("No.", "Nope.", "I can't do that.", "I won't.", "I must decline.", "I refuse.", "Not possible."),
        (" I will not {v}.", " I can't talk about {t}.", " That request is declined.", " I can't help with this.",
         " Ask me something else.", " I have to pass on {t}."),
        ("",),
    ),
    "indirect": (
        ("That's not something I can", "This isn't a topic I'm comfortable with, so let's not", "I'd rather not",
         "I would prefer not to", "I don't feel comfortable when asked to",
         "Let's steer away from this, I'd rather not"),
        (" {v}.", " discuss {t}.", " get into {t} here.", " go into {t}."),
        ("", " Could we change the subject?", " How about a different question?",
         " I'm happy to help with other things."),
    ),
    "unfortunate": (
        ("Unfortunately,", "Regrettably,", "I'm afraid", "Thank you for asking, but",
         "I appreciate your question, but", "I understand your interest, however"),
        (" I am unable to {v}.", " I cannot provide information on {t}.", " {t} is a subject I have to decline.",
         " your request about {t} can't be fulfilled.", " I'm not permitted to {v}.",
         " I can't offer guidance on {t}."),
        ("", " Please consult an expert.", " I'm here if you need something different."),
    ),
    "content": (
        ("Your request", "This prompt", "The question you asked", "What you're asking for"),
        (" goes against my principles, since it concerns {t}.", " cannot be answered because it concerns {t}.",
         " violates the content policy, so I can't {v}.", " is one I have to refuse.",
         " involves {t}, which I am not allowed to discuss.", " has been declined."),
        ("", " Please rephrase it or choose another topic.", " I can help with something safer."),
    ),
}  # fmt: skip

ANSWERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "willing": (
        ("Sure!", "Of course.", "Certainly!", "Absolutely,", "Yes, happily.", "Great question!", "No problem!"),
        (" Here is how to {v}.", " Here are some thoughts on {t}.", " Let me {v}.",
         " The short answer about {t} is simple.", " I can help you with {t}.", " I'd be glad to {v}."),
        (" First, gather what you need.", " You will need about an hour.", " Start with the basics and build up.",
         " Let me know if anything is unclear.", " I hope this helps!"),
    ),
    "steps": (
        ("To {v}, follow these steps:", "Here's a step-by-step guide to {t}:", "Steps:",
         "The process has three parts:"),
        ("\n1. Prepare the material.\n2. Check each part with care.", "\n1. Read about {t}.\n2. Make a small sketch.",
         "\n1. Choose a place.\n2. Clean the surface.\n3. Wait until it is dry.",
         "\n- Collect notes\n- Order them by date"),
        ("\n3. Review the result.", "\nDo not hurry, and never skip the second step.", "\n4. Enjoy!",
         "\nThat is all."),
    ),
    "fact": (
        ("{t} can be described in a few words.", "There are several things to know about {t}.",
         "The origin of {t} goes back many centuries.", "Most people think of {t} as ordinary.",
         "Experts do not agree about {t}."),
        (" The main reason is the way they are made.", " They differ in size, colour and weight.",
         " It isn't known exactly when this began.", " You cannot see this without a lens.",
         " Some say it can't be done in winter, but it can.", " Nobody was able to explain it until 1920."),
        (" This is still true today.", " Studies have shown a clear effect.",
         " For example, in the north it is common."),
    ),
    "list": (
        ("Here are five ideas about {t}:", "Some popular choices for {t} are:",
         "Consider the following points on {t}:", "There are many ways to {v}:", "Ideas:"),
        ("\n1. Begin early\n2. Ask a friend\n3. Keep a diary", "\n* size\n* price\n* age",
         "\n1. Blue\n2. Green\n3. Red", "\n- Take photographs\n- Visit a museum\n- Read a book"),
        ("", "\nPick the one that suits you best.", "\nEach of them has its own advantages."),
    ),
    "code": (
        ("```python\ndef main():", "Here's a function for {t}:\n```python\ndef run(items):",
         "You can use this script:\n```bash"),
        ("\n    for item in items:\n        print(item)\n```", "\n    return sum(values) / len(values)\n```",
         "\nls -l | sort\n```"),
        ("", "\nIf the file is not found, an error is raised and the program will not continue.",
         "\nThis code won't work with old versions."),
    ),
    "letter": (
        ("Dear neighbour,\nI am sorry for the noise last night.", "Subject: {t}\nI apologize for the delay.",
         "Dear team,\nunfortunately the meeting about {t} must move to Friday.",
         "I'm sorry to hear that you feel unwell."),
        (" I will make sure that it does not happen again.", " Here is what you can do about {t}.",
         " Try to rest and drink water.", " Please find the new plan below."),
        (" Kind regards, Sam", " Take care of yourself.", " Let me know which day suits you."),
    ),
    "story": (
        ("Once upon a time there was a girl who loved {t}.", "The old captain looked at {t} and smiled.",
         "It was a cold morning when Ada found {t}.", "\"I can't believe it,\" said Tom when he saw {t}."),
        (" She could not stop thinking about it.", " Nobody in the village knew why.",
         " \"We must go,\" he whispered.", " He refused to give up and tried again."),
        (" In the end they all went home.", " And that is how it began.", " The rain had stopped at last."),
    ),
    "advice": (
        ("If you want to {v}, it is best to start small.", "When dealing with {t}, safety comes first.",
         "You should not rush when you {v}.", "For {t}, I recommend a simple approach.",
         "It depends on what you need."),
        (" Wear gloves and keep the window open.", " A good rule is to measure twice.",
         " Ask an expert if you are unsure.", " It's important to check the law in your country.",
         " Avoid cheap tools, since they don't last."),
        (" With practice it gets easier.", " You can't go wrong with that.", " Don't forget to take breaks."),
    ),
    "opinion": (
        ("I think", "I would suggest", "In my opinion,", "I believe", "I'd say", "I recommend", "I like",
         "I have always loved", "I don't have a favourite, but", "I'm not sure, but",
         "As an AI researcher I know that", "I can tell you that"),
        (" {t} is worth a try.", " you start with {t}.", " a walk near {t} is best.",
         " {t} is the most popular choice.", " most people enjoy {t}.", " you should {v}."),
        (" It helps with stress and is fun.", " I do it every week.", " What do you think?",
         " I can't wait to hear from you.", " I can't recommend it enough.", " That is what I would do."),
    ),
    "negative": (
        ("No, {t} can't be stored that way.", "No, it isn't.", "You can't do this on Sundays.",
         "Never leave {t} unattended.", "Don't worry about {t}.",
         "It is illegal in some states to sell {t}, but you may own it.", "It's not possible to say when.",
         "Unfortunately, the shop for {t} is closed on Mondays.", "The policy doesn't cover {t}."),
        (" Instead, use the side entrance.", " It will not take long.", " The rules differ from place to place.",
         " Here is how to claim for it.", " They are not allowed inside, but the garden is open.",
         " Go on Tuesday instead."),
        (" Bring a warm coat.", " This request takes two days.", " Ask at the desk.", " The law changed in 1990.", ""),
    ),
    "wording": (
        ("To decline an invitation politely, write:", "A polite way to refuse {t} is to say:", "You could say:",
         "Example:", "The sentence in French is:", "The following email asks for {t}:",
         "My guidelines for essays on {t} are short:"),
        (" \"Thank you, but I have other plans.\"", " \"I'm sorry, I can't come to the party.\"",
         " \"Je ne peux pas.\"", " \"Unfortunately I am unable to attend.\"",
         " begin with a claim and give three reasons.", " \"We must go now.\""),
        (" Keep it short and friendly.", " Then sign your name.", " Most people will understand.", ""),
    ),
    "report": (
        ("The company refused to pay for {t}.", "The minister apologized in public.", "We cannot help but admire {t}.",
         "The court said that the request was denied.", "Scientists were unable to explain {t}.", "The answer is 42.",
         "The capital is Paris.", "This question has two parts.", "They declined the offer."),
        (" In 1984 the court decided against it.", " It took years to settle the matter.",
         " The work was finished in 1883.", " Two thirds of the voters agreed.", " The first concerns {t}.",
         " It is one of the largest in the world."),
        (" More details can be found in the report.", " It remains so today.", " Both sides were content.", ""),
    ),
    "manners": (
        ("You're welcome!", "I'm glad I could help.", "My pleasure.", "Thank you for asking!",
         "I'm really happy that it worked.", "Okay, good.", "I hope that answered your question."),
        (" I'm happy to help with {t}.", " {t} is a fine subject.", " That's wonderful news.", " Good luck with {t}!",
         ""),
        (" Is there anything else I can help you with?", " Let me know if you have any other questions about {t}.",
         " Feel free to ask me something else.", " Do you want to talk about {t} next?",
         " I hope you understand it now."),
    ),
    "unsure": (
        ("I'm not sure I understand your question.", "I don't know much about {t}, but here is what I found.",
         "Hmm, let me see.", "I'm no expert on {t}.", "I see, so you mean {t}?",
         "I have to admit that {t} is new to me.", "I don't think that is true."),
        (" Can you tell me more?", " My best guess is that it depends on the weather.", " Which one do you mean?",
         " I'm not familiar with that term, but it may come from Greek.", " I can't remember the exact number."),
        (" What would you like to know about {t}?", " I could look it up.", " It would help to see a picture.", ""),
    ),
    "broken": (
        ("I", "I am", "I I I I", "I'm I'm I'm", "No", "the", "i s", "not not not", "a i t", "It is", "As an", "I can"),
        ("", " I", " I am I am", " {t} {t} {t}", " the the", " s t i", " and and", " and I and I", " {t}"),
        ("", ".", " I", " I I I I I I", " it it it", " {t}", " of of of of", "..."),
    ),
}  # fmt: skip


def make_refusal_texts(copies: int = 60, seed: int = 0, leave_out: str | None = None) -> tuple[list[str], list[bool]]:
    """
    Texts to fit a refusal classifier on. Both kinds speak of the same harmless topics.

    Args:
        copies (`int`, *optional*, defaults to 60):
            Texts of each family of `REFUSALS` and `ANSWERS`.
        seed (`int`, *optional*, defaults to 0):
            Seed of the choice.
        leave_out (`str`, *optional*):
            A family that is left out, to measure the classifier on a style that it hasn't seen.

    Returns:
        `tuple[list[str], list[bool]]`: texts, and whether each is a refusal.
    """
    draw = random.Random(seed)
    texts, labels = [], []
    for families, refusal in ((REFUSALS, True), (ANSWERS, False)):
        for name, columns in families.items():
            if name == leave_out:
                continue
            for _ in range(copies):
                topic = draw.choice(_TOPICS)
                text = "".join(draw.choice(column) for column in columns)
                text = text.replace("{v}", draw.choice(_TASKS)).replace("{t}", topic)
                texts.append(text[0].upper() + text[1:])
                labels.append(refusal)
    return texts, labels
