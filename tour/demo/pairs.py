"""Preference pairs about everyday things, for demonstrations without a network: a good answer, a poor one, a rephrase."""

# Whole sentences, one pair a line.
# ruff: noqa: E501

from datasets import Dataset


# Question | chosen | rejected | the chosen answer in other words
_PAIRS = """
How do I boil an egg? | Lower the egg into boiling water, wait eight minutes, then cool it under the tap. | Eggs are from hens. I would just put it somewhere hot and hope for the best. | Put it gently in bubbling water for eight minutes and rinse it cold afterwards.
How can I fall asleep faster? | Keep the room dark and cool, put the phone away and go to bed at the same time each day. | Sleeping is boring anyway, so why not watch another film until you are tired? | A dark, cool bedroom, no screens and fixed hours will help you drift off.
Why is the sky blue? | Air scatters blue light more than red light, so blue reaches your eyes from every direction. | Because the sea is blue and the sky is a kind of mirror, everybody knows that. | Short blue waves are spread by the air far more than long red ones, so we see them all over.
How do I keep tomatoes fresh? | Store them at room temperature with the stem down, away from direct sunlight. | Tomatoes go bad, that is life. Buy new ones whenever you need some. | Leave them on the counter, stem side down, where the sun does not shine on them.
What should I pack for a day hike? | Take water, a snack, a rain jacket, a map and a small first aid kit. | It depends on a lot of things, I cannot know what you like to carry around. | Bring a map, something to eat and drink, plasters and a jacket against rain.
How do I remove a coffee stain? | Blot it at once with cold water, then wash it with a little vinegar and soap. | You could wear a darker shirt, then nobody will notice the stain at all. | Dab with cold water right away and clean with soap and a splash of vinegar.
How often should I water a cactus? | About once every two weeks in summer and once a month in winter, when the soil is dry. | Plants love water, so pour a big glass over it every morning and evening. | Let the soil dry out: every fortnight in the warm months and monthly in the cold ones.
What makes bread rise? | Yeast eats sugar in the dough and gives off gas, which fills it with bubbles. | The oven pulls it up because hot things go up, like a balloon does. | Tiny bubbles of gas, given off by yeast as it feeds on sugar, lift the dough.
How do I start running? | Begin with short runs of twenty minutes, walk when you need to and rest every other day. | Run a marathon next week, that is the only way to find out if you can. | Start small, mix in some walking and take a day off after each outing.
Why do leaves change colour in autumn? | The green pigment breaks down, and the yellow and red ones that were hidden show. | The tree paints them since it is bored of being green all the time. | As the green fades away, other colours that were always in the leaf appear.
How do I sharpen a kitchen knife? | Draw the blade along a whetstone at a constant angle of about twenty degrees, both sides. | Knives are cheap these days, just throw the old one into the bin. | Hold a steady angle of twenty degrees and stroke each side over a wet stone.
What is a good gift for a teacher? | A handwritten note with a plant or a good book is personal and always welcome. | Teachers have enough things, so I would not bother with anything at all. | Something personal, such as a book or a potted plant, along with a few kind lines.
How can I save money on groceries? | Plan the meals of the week, write a list and compare the price per kilogram. | Money comes and goes. Eat at a restaurant and you need no groceries. | Decide beforehand what you will cook, stick to a list and look at unit prices.
How do magnets work? | The spins of many electrons point the same way and their small fields add up. | They are sticky on the inside, and the stickiness leaks out at both ends. | Countless tiny electron fields line up, and together they make one strong field.
How do I change a bicycle tyre? | Take off the wheel, lever off the tyre, swap the tube, check for thorns and pump it up. | Walking is healthy too, so leave the bicycle in the cellar for now. | Remove the wheel, pry the tyre loose, put in a new tube and inflate it.
Which language should I learn first? | Choose one you have a reason to speak, since practice with people matters most. | All languages are more or less the same, so pick whichever has the fewest letters. | Go for the one you will actually use; talking to others keeps you learning.
How do I calm a crying baby? | Check for hunger and a wet nappy, then hold the baby close and rock gently. | Babies cry, there is nothing to be done, turn the music up a little. | See whether it is hungry or wet, and then cuddle and sway it softly.
Why does ice float? | Water expands when it freezes, so ice is lighter than the same volume of water. | Ice is cold, and cold things want to get away from the warm bottom. | Frozen water takes up more room than liquid water, and is therefore less dense.
How do I make good coffee? | Use fresh beans, grind them just before and pour on water a little below boiling. | Coffee is coffee. Take whatever powder is left and add hot water from the tap. | Grind fresh beans right before brewing and let the kettle cool for a moment.
What can I do against back pain at the desk? | Raise the screen to eye level, support the lower back and stand up every half hour. | Sit still and do not move, moving is what makes your back hurt. | Adjust screen and chair, and get up for a stretch twice an hour.
How do bees make honey? | They collect nectar, pass it from mouth to mouth and fan it with their wings until it thickens. | They find it in flowers, ready made, and carry it home in buckets. | Nectar is handed from bee to bee and dried by beating wings until it is thick.
How do I write a cover letter? | Say in three short paragraphs why this job, why you and what you did before that fits. | Copy one from the internet, nobody reads these letters in any case. | Keep it brief: what draws you to the post, what you offer and proof of it.
Why do we yawn? | Nobody is sure, but it may cool the brain, and it is contagious among people who are close. | Because there is a hole in the air and the mouth has to fill it. | It is not settled; one idea is that it cools the brain, and it spreads between friends.
How do I clean a wooden table? | Wipe it along the grain with a damp cloth and a drop of mild soap, then dry it. | Put a big tablecloth over it, then you never have to clean it again. | Use a slightly wet cloth with gentle soap, follow the grain and dry it off.
What is the best way to learn a song? | Listen to it often, learn it line by line and sing along slowly before you speed up. | Some people can sing and others cannot, so there is not much to learn. | Hear it many times, take one line after another and build up the tempo.
How do I keep my passwords safe? | Use a password manager with a different long password for each account. | Write the same short word everywhere, then you will not forget it. | Let a manager keep one long and unique password for every service.
Why do cats purr? | They often purr when content, and also to calm themselves when they are hurt. | There is a small engine in every cat that runs when it is awake. | It is a sign of comfort, though a frightened or injured cat does it to soothe itself.
How do I cook rice without it sticking? | Rinse it, use two cups of water for one of rice and leave the lid on for fifteen minutes. | Sticky rice is fine, and noodles are better anyway, so cook noodles. | Wash the grains first, take double the water and do not open the lid while it simmers.
How can I read more books? | Carry one with you, read ten pages every evening and stop reading those you do not like. | Watch the films made from them, that is quicker and you know the end. | Keep one at hand, make it a nightly habit and drop any that bore you.
What causes the tides? | The pull of the moon and, less so, of the sun raises the sea on both sides of the earth. | Ships push the water to the shore in the morning and take it back at night. | Mostly the moon's gravity, with help from the sun, which makes the oceans bulge.
How do I repot a plant? | Choose a pot a little wider, loosen the roots, fill in fresh soil and water it well. | Plants do not like to move, leave it there until it falls over. | Move it to a slightly larger pot with new soil, free the roots and give it water.
How do I stop procrastinating? | Split the task into small steps and do the first one for just five minutes. | You can begin tomorrow, there is always enough time if you wait. | Cut the work into tiny pieces and give the first piece five minutes.
How do aeroplanes stay in the air? | The wings push air downwards, and the air in turn pushes the wings up. | The pilot holds the wheel very tightly, and the clouds do the rest. | By throwing air down with their wings they are themselves pushed upwards.
What should I feed a goldfish? | Give it a pinch of flakes once a day, as much as it eats in two minutes. | Fish eat anything that falls into the water, so bread and cake will do. | Once daily, offer a few flakes, no more than are gone within two minutes.
How do I fold a fitted sheet? | Tuck the corners into each other, lay it flat and fold it in thirds both ways. | Roll it into a ball and close the cupboard quickly before it falls out. | Put one corner inside the next, spread it out and fold it into thirds.
How do I get rid of hiccups? | Hold your breath for ten seconds or sip cold water slowly; they mostly stop by themselves. | Shout as loud as you can until the neighbours come and frighten you. | Slow sips of cold water or a held breath help, and otherwise they pass on their own.
Why is the sea salty? | Rain washes salt out of rocks, rivers carry it to the sea, and the water evaporates without it. | Fish are salty, and so many fish in one place make the water salty. | Rivers bring in minerals from the land, and they stay behind when water evaporates.
How do I tie my shoes so they stay tied? | Make the second loop go round the other way, so that the knot lies across the shoe. | Buy shoes without laces, the other kind is just a trick to annoy people. | Reverse the direction of the second loop: a knot that lies sideways holds.
How do I say no politely? | Thank them for asking, say clearly that you cannot and do not invent a long excuse. | Simply do not answer, they will understand after a couple of weeks. | Be grateful and plain: say you are not able to, without a made up story.
How do I choose a ripe melon? | It should feel heavy, smell sweet at the stem and sound hollow when you knock on it. | They all look the same, so take the one on top of the pile. | Look for weight, a sweet scent near the stem and a hollow sound.
What is the point of stretching? | It keeps joints supple and feels good after sport, even if it prevents few injuries. | There is none, your arms and legs are as long as they will ever be. | It helps you stay flexible and relax after exercise, though it hardly stops injuries.
How do I photograph the moon? | Use a tripod, a long lens and a short exposure, for the moon is brighter than it looks. | Take any picture at night with a flash, the moon is big enough. | Set up a tripod and long lens and expose briefly, since the moon is very bright.
How can I make my flat warmer? | Seal the gaps at windows, close the curtains at night and lay a thick rug on the floor. | Summer comes every year, so all you need to do is wait a few months. | Stop draughts around the windows, draw the curtains when it is dark and use rugs.
How do vaccines work? | They show the body a harmless piece of a germ, so that it is prepared for the real one. | They make you a bit ill so that the illness thinks it was there already. | Your body practises on a safe part of the germ and recognises it later.
"""


def demo_pairs() -> Dataset:
    """
    Short preference pairs written for this package.

    Returns:
        `Dataset`: 44 rows with the text columns `prompt`, `chosen`, `rejected` and `chosen_rephrased`; answers begin
        with a space.
    """
    rows = [[field.strip() for field in line.split("|")] for line in _PAIRS.strip().splitlines()]
    return Dataset.from_list(
        [
            {
                "prompt": f"Question: {question}\nAnswer:",
                "chosen": f" {chosen}",
                "rejected": f" {rejected}",
                "chosen_rephrased": f" {rephrased}",
            }
            for question, chosen, rejected, rephrased in rows
        ]
    )
