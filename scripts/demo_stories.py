"""The sentences of the demo model's stories: plots, openings and endings as templates.

A bracket ``[a|b|]`` becomes one of its alternatives, also nested; a macro ``<said>`` stands for a bracket; a slot
``{A}`` is filled from the story's world. ``A`` is the hero (``he``, ``him``, ``his``), ``B`` the other one (``bhe``,
``bhim``, ``bhis``), ``kin`` somebody of the family (``ghe``, ``ghim``, ``ghis``). A plot is a list of beats told in
this order, each beat a choice of templates; an empty one leaves the beat out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plot:
    """What happens in a story.

    Attributes:
        beats: the templates of each step.
        pairs: question and answer templates that hold however the beats were told.
        endings: the templates of the last sentence; nobody walks home who is at home already.
        weather: whether a sentence on the weather may stand after the first beat.
    """

    beats: tuple[tuple[str, ...], ...]
    pairs: tuple[tuple[str, str], ...]
    endings: tuple[str, ...]
    weather: bool = True


# Wordings that many templates share.
MACROS = {
    "<one day>": "[One {day}|One {day}|Then, one {day}|On a {day}|One {day} not long ago|One day]",
    "<said>": "[said|said|said|called]",
    "<way>": "[ at once| after a moment| with a nod| in a calm voice||||]",
}

ONCE_UPON_A_TIME = (
    "Once upon a time, there was {a_kind} [named|called] {A}[ who lived [near|close to|not far from] {home}|].",
    "Once upon a time there was {a_kind} [named|called] {A}[ who lived [near|close to|not far from] {home}|].",
    "Once upon a time, {a_kind} [named|called] {A} lived [near|close to|not far from] {home}[ with {his} {kin}|].",
    "Once upon a time, in a [small village|quiet town|little house], there lived {a_kind} [named|called] {A}.",
)
OTHER_OPENINGS = (
    "[Long ago|Many years ago|Some time ago], [near|not far from] {home}, there lived {a_kind} [named|called] {A}.",
    "There once was {a_kind} [named|called] {A}[ who lived near {home}|].",
    "{A} was {a_kind} who lived [near|close to|not far from] {home}[ with {his} {kin}|].",
    "This is [a story about|the story of] {A}, {a_kind} who lived [near|close to] {home}.",
    "In [a little|a small|an old] house near {home}, there lived {a_kind} [named|called] {A}.",
    "{a_kind} [named|called] {A} lived [in a small village|in a quiet town|near {home}].",
    "Have you heard of {A}? {A} was {a_kind} who lived [near|close to] {home}.",
    "The {kind} was [named|called] {A}, and {he} lived near {home}.",
    "[Near|Not far from] {home}, there was {a_kind} [whose name was|called] {A}.",
)
TRAITS = (
    "{A} was [very|always|so] {trait}[ and had a big smile| and never gave up| and asked many questions| "
    "and loved to laugh|].",
    "{he} [loved|liked] to {hobby}[ every day| all day long| in the morning| with {his} {kin}|].",
    "[Everyone|Everybody] liked {A} because {he} was so {trait}.",
    "More than anything, {A} [loved|liked] to {hobby}.",
    "{A} and {his} {kin} [loved|liked] to {hobby}[ together|].",
    "",
)
WEATHER = (
    "", "", "",
    "The sun was [warm|bright|shining] and the birds were singing[ in the trees|].",
    "The sky was [blue|clear] and [a soft wind|a gentle wind] blew[ through the trees|].",
    "It was a [lovely|beautiful|quiet] [place|day], and the air smelled [of flowers|sweet|fresh].",
    "There was not a single cloud in the sky.",
)  # fmt: skip
THE_END = (
    "It was the best day [of all|that {A} had ever had|in a long time].",
    "{A} never forgot that {day}.",
    "From that day on, {A} was [happier than ever|never sad for long].",
    "[After that|From then on], {A} often [thought|spoke] of that {day}[, and it made {him} smile|].",
    "",
)
WENT_HOME = (
    "[And so |So |Then ]{A} went home [with a big smile|feeling very happy|tired but happy].",
    "That night, {A} [slept well|fell asleep with a smile|dreamed of {the_place}|told {his} {kin} all about it].",
)
FRIENDS = (
    "[From that day on|After that|And from then on], {A} and {B} were [best friends|good friends|always together].",
    "[And |]{A} and {B} [stayed friends|were friends] [forever|for a long, long time].",
    "They [laughed|sang|danced|were happy] until the sun went down.",
    "{A} and {B} both [knew|felt] that [a good friend is the best thing of all|friends help each other].",
)
WALKED_HOME = (
    "[And |So |Then ]{A} and {B} [walked|went|ran] home together[, singing all the way| before it got dark|].",
)
MORNING = (
    "In the morning, {A} [told {his} {kin} about it|felt very brave|woke up with a smile|was happy and rested].",
    "And {he} [had only good dreams|dreamed of {the_place}|slept until the morning].",
    "",
)
OUT_ALONE, OUT_TOGETHER, AT_HOME_TOGETHER = (
    THE_END + WENT_HOME,
    THE_END + WENT_HOME + FRIENDS + WALKED_HOME,
    THE_END + FRIENDS,
)
FILLERS = (
    "It was a [quiet|cold|warm|busy|rainy|sunny|long] [day|morning|week].",
    "The [sun|wind|rain] was [strong|gentle] that day.",
    "[Everybody|Everyone] was [busy|happy|at home].",
    "Nobody [knew why|said a word|was in a hurry].",
    "The birds were [singing|quiet].",
)

LOST = Plot(
    (
        ("{A} had {a_obj} and [took it everywhere|played with it every day|loved it very much].",
         "{his} favorite thing [in the world|of all] was {a_obj}[ that {his} {kin} had given {him}|]."),
        ("<one day>, {A} [went|walked|ran] {to}[ to play| with {his} {thing}|]. [But suddenly|Suddenly|Soon], "
         "the {obj} was gone!",
         "<one day>, when {A} was {place}, the {obj} was [gone|lost]."),
        ("{A} [looked|searched] {spot}, but the {thing} was not there.",
         "First {he} looked {spot}. Then {he} looked {spot2}. [Nothing|There was nothing|The {thing} was not there]!",
         "{he} [looked|searched] [high and low|everywhere], but {he} could not find it."),
        ('{A} [felt sad|was very sad|began to cry]. "[Where is my {thing}|Where can my {thing} be]?" '
         '{he} [asked|said|cried].',
         "{he} sat down and [felt very sad|began to cry|did not know what to do]."),
        ('Then {his} {role} {B} came by. "[I will help you|Let us look together|Do not worry, we will find it]," '
         '{bhe} said.',
         '{B}, {his} {role}, heard {him}. "[Do not be sad|Do not cry]," <said> {B}<way>. '
         '"[I can help you|We can look together]."',
         "{his} {role} {B} saw that {A} was sad and [wanted|offered] to help."),
        ("[Together they|The two of them|They] [looked|searched] [again|everywhere|for a long time], "
         "and {B} found the {thing} {spot3}.",
         "They looked [once more|again], and there it was: {B} found the {obj} {spot3}!"),
        ('"Thank you, {B}!" [said|cried] {A}[, and {he} hugged {bhim}| with a smile|].',
         "{A} was so [happy|glad] that {he} [hugged {B}|jumped up and down|danced].",
         "{A} thanked {B} and [held the {thing} tight|hugged {bhim}]."),
    ),
    (("What did {A} lose?", "{A} lost {a_obj}."), ("Who found the {obj}?", "{B} found the {obj}."),
     ("Where did {B} find the {obj}?", "{B} found the {obj} {spot3}.")),
    OUT_TOGETHER,
    weather=False,
)  # fmt: skip
SHARING = Plot(
    (
        ("<one day>, {A} [took|carried|brought] {his} {obj} {to}.",
         "<one day>, {A} was playing with {his} {obj} {place}."),
        ("{B} was there too, and {bhe} had nothing to play with.",
         "{his} {role} {B} came and [watched|looked at the {thing}].",
         "Soon {B}, {his} {role}, came by and saw the {thing}."),
        ('"[May I|Can I] play with it[ too|, please|]?" {B} asked.',
         '"What a [nice|lovely] {thing}!" <said> {B}<way>. "May I try it?"'),
        ('"No, it is mine," <said> {A}<way>. {B} [looked sad|walked away slowly|said nothing and sat down].',
         "{A} did not want to share, so {B} [looked sad|sat down alone|walked away]."),
        ("[But then|After a while], {A} saw [how sad {B} was|that playing alone was no fun|{B} sitting all alone].",
         "{A} [thought about it|felt bad]. It was not [nice|kind] to [leave {B} alone|keep everything]."),
        ('"[I am sorry|Please come back], {B}," {A} said. "[We can play together|You can have a turn|'
         'Let us share the {thing}]."',
         "So {A} [gave {B} the {thing}|let {B} try the {thing}|went to {B} and shared the {thing}]."),
        ("They played with the {obj} [until the sun went down|all afternoon|and laughed a lot|again and again].",
         "{B} smiled, and [they took turns|both had a lot of fun|the two of them played all day]."),
        ("{A} [learned|knew now] that [sharing is fun|sharing makes everyone happy|it is good to share].", ""),
    ),
    (("What did {A} share?", "{A} shared the {obj}."),
     ("Who wanted to play with the {obj}?", "{B} wanted to play with the {obj}.")),
    OUT_TOGETHER,
)  # fmt: skip
RESCUE = Plot(
    (
        ("<one day>, {A} [went|walked] {to}. [There {he}|{he}] heard a [small|soft|sad] sound.",
         "<one day>, {A} was {place} when {he} heard a [small|soft|sad] sound."),
        ("{A} [looked around|followed the sound] and saw {a_pet} {spot}.",
         "It was {a_pet}! It was [sitting|hiding] {spot}."),
        ("The {pet} was [cold and hungry|hurt and could not walk|stuck and could not get out|all alone and scared].",
         "The poor {pet} [could not move|was shaking|looked so scared]."),
        ('"[Do not be afraid|Do not worry], little {pet}," {A} [said softly|said|whispered]. "I will help you."',
         "{A} [spoke softly|moved very slowly] so that the {pet} would not be afraid."),
        ("{he} [used {his} {obj} to help it|put the {pet} in {his} coat to keep it warm|"
         "lifted the {pet} up very gently].",
         "{he} gave the {pet} [some water|some {food}|a warm place to rest]."),
        ("{A} took the {pet} home, and {his} {kin} [helped {him}|made a little bed for it|gave it some food].",
         "{his} {kin} came and helped {him} [carry the {pet} home|take care of it]."),
        ("[After a few days|The next day|Soon], the {pet} was [well|strong] again.",
         "Day after day, the {pet} got [better|stronger]."),
        ("The {pet} [stayed with|never left] {A}, and they [played together every day|were the best of friends].",
         "{A} let it go, but the {pet} [came back every day|always came back to visit {him}].",
         'The {pet} looked at {A} as if to say, "Thank you."'),
    ),
    (("What did {A} find?", "{A} found {a_pet}."), ("Where was the {pet}?", "The {pet} was {spot}."),
     ("Who helped the {pet}?", "{A} helped the {pet}.")),
    THE_END,
)  # fmt: skip
GIFT = Plot(
    (
        ("[It was|Soon it would be] the birthday of {his} {kin}, "
         "and {A} wanted to [make a gift|give {ghim} something special].",
         "{A} wanted to [make|give] {his} {kin} [a gift|something nice] for {ghis} birthday."),
        ("{he} had no money, but {he} had [an idea|a plan].",
         '"What [can|should] I [give|make]?" {A} [thought|asked {B}].',
         "{he} thought about it [all day|for a long time]."),
        ("{A} went {to} and found {count} {many} {spot}.", "{he} looked {place} and found {count} {many} {spot}."),
        ("{his} {role} {B} [helped {him}|came to help]. They [worked|sat] together [all day|for hours].",
         '"I will help you," said {his} {role} {B}, and they [worked|sat] together [all day|for hours].'),
        ("They made {a_obj} and laid the {many} around it.",
         "They laid the {many} [in a ring|on a table], and in the middle they put {a_obj} that they had made."),
        ("{A} gave the {obj} to {his} {kin}. {his} {kin} [smiled|was so happy|hugged {him}].",
         '"This is for you," said {A} and gave the {obj} to {his} {kin}.'),
        ('"[This is the best gift of all|What a lovely {thing}]!" [said {his} {kin}|{ghe} said].',
         "{his} {kin} [loved it|said that it was the best gift ever|put it in the best place in the house]."),
    ),
    (("What did {A} make?", "{A} made {a_obj}."), ("Who helped {A}?", "{B} helped {A}."),
     ("How many {many} did {A} find?", "{A} found {count} {many}.")),
    THE_END,
    weather=False,
)  # fmt: skip
STORM = Plot(
    (
        ("<one day>, {A} and {his} {role} {B} [went {to} to play|played {place}].",
         "<one day>, {A} met {his} {role} {B} {place}."),
        ("[Suddenly|Then|After a while], [dark clouds came|the sky turned dark] and it began to [rain|rain very hard].",
         "But then a [big|strong] storm came, and [the rain was cold|the wind blew very hard]."),
        ('"[Oh no|Look]!" [cried|said] {B}. "[We must go home|We will get wet]!"',
         "{B} was [afraid|scared] of the [thunder|storm] and held {A} by the hand."),
        ('"[Come with me|Follow me|Do not be afraid]," <said> {A}<way>. "[I know a dry place|We can hide {spot}]."',
         "{A} [knew what to do|had an idea|stayed calm]."),
        ("They [ran|hurried] and [hid|sat down] {spot}.", "They [found a dry place|hid] {spot} and waited."),
        ("{A} [told a funny story|sang a song|held up {his} {obj}] so that {B} would not be afraid.",
         "To [keep warm|pass the time], they [sang songs|told stories|shared some {food}]."),
        ("[Soon|After a while|At last], the rain stopped and the sun came out[ again|].",
         "[At last|Then] the storm was over."),
        ("[There was|They saw] a [big|beautiful] rainbow in the sky.", '"Look, a rainbow!" [cried|said] {A}.',
         "They jumped in [all the|the] puddles and laughed."),
    ),
    (("Who was with {A}?", "{B} was with {A}."), ("Where did they hide?", "They hid {spot}.")),
    OUT_TOGETHER,
)  # fmt: skip
NIGHT = Plot(
    (
        ("[But {A}|{A}] was afraid of the [dark|night].", "There was one thing that {A} did not like: the dark."),
        ("One [night|evening], {he} [could not sleep|heard a strange noise|saw a shadow on the wall].",
         "[Every night|At night], {he} [hid under the blanket|called for {his} {kin}|could not sleep]."),
        ('"[Who is there|What was that]?" {he} [whispered|asked], but nobody answered.',
         "{his} heart [beat very fast|went boom, boom, boom].", ""),
        ("{his} {kin} came [in|to {his} bed] and [sat down|brought {a_obj}|lit a small lamp].",
         "{A} called {his} {kin}, and {ghe} came [at once|with {a_obj}]."),
        ('"[Look out of the window|Look at the stars]," <said> {his} {kin}<way>. '
         '"[The moon watches over you|Each star is a light]."',
         '"The dark is [only the day asleep|not bad]," <said> {his} {kin}<way>. '
         '"[It helps us to rest|Listen to how quiet it is]."'),
        ("[Together they|They] [counted the stars|looked at the moon|told stories] until {A} [yawned|felt calm].",
         "{A} looked [out|up] and saw {count} [bright|little] stars."),
        ("{A} [closed {his} eyes|put {his} head on the pillow] and [was not afraid any more|fell asleep].",
         "After that, {A} was not afraid of the dark [any more|again]."),
    ),
    (("What was {A} afraid of?", "{A} was afraid of the dark."),),
    MORNING,
    weather=False,
)  # fmt: skip
NEW_FRIEND = Plot(
    (
        ("[But {A}|{A}] had [no one to play with|no friends yet], and that made {him} sad.",
         "{A} was often [lonely|alone] and wished for a friend."),
        ("<one day>, {he} [took {his} {obj} and |]went {to}.", "<one day>, {A} was {place} with {his} {obj}."),
        ("There {he} saw {a_bkind} sitting {spot}.", "[There was|{he} met] {a_bkind} {place}, all alone.",),
        ('"[Hello|Good morning]!" <said> {A}<way>. "[What is your name|Who are you]?" "[My name is|I am] {B}," '
         'said the {bkind}.',
         'The {bkind} was [shy|quiet] at first. "My name is {B}," {bhe} said [at last|softly|with a smile].'),
        ('"[Do you want to play|Would you like to play] with [me|my {thing}]?" asked {A}.',
         "{A} showed {B} {his} {obj}.", "{A} [asked {B} to play|gave {B} some {food}]."),
        ("They [played|ran|laughed] [all day|until the evening|for hours] {place}.",
         "{B} knew [many|a lot of] games, and they played {place} [all day|until it was dark]."),
        ("{A} was not [lonely|alone] any more.",
         '"Will you come [again|back] tomorrow?" asked {A}. "Yes," <said> {B}<way>.'),
    ),
    (("Who did {A} meet?", "{A} met {B}."), ("Where did they play?", "They played {place}."),
     ("What did {A} have?", "{A} had {a_obj}.")),
    OUT_TOGETHER,
    weather=False,
)  # fmt: skip
SEED = Plot(
    (
        ("<one day>, {A} found a [tiny|small|strange] seed {spot}.",
         "<one day>, {his} {kin} gave {A} a [tiny|small|strange] seed."),
        ('"[What will it be|What will grow]?" {A} [asked|wondered].',
         '"Plant it and [wait|you will see]," <said> {his} {kin}<way>.',),
        ("{A} [dug a hole|made a small hole] {place} and put the seed in [it|the ground].",
         "{he} planted the seed {place}[, where the sun was warm|]."),
        ("Every [day|morning], {he} [gave it water|watered it][ from an old can|] and "
         "[waited|looked at it|sang to it].",
         "{he} watered it [day after day|each morning] and [waited|did not forget it]."),
        ("[For a long time|At first], nothing happened. [But {A}|{A}] did not give up.",
         '"[It is too slow|Nothing grows here]," <said> {B}<way>. But {A} [waited|did not give up].'),
        ("[Then|At last|After many days], a [small|little] green leaf came out of the ground.",
         "Then it rained, and [the next day|in the morning] there was a [small|little] green leaf."),
        ("The plant grew [taller and taller|bigger every day], "
         "and soon it had {count} [white|red|yellow|blue] flowers.",
         "It grew [and grew|day by day] until it was [taller than {A}|as tall as the fence]."),
        ("{A} was [so |very |]proud[ and showed it to {his} {kin}|].",
         '"[Good things take time|You were very patient]," <said> {his} {kin}<way>.'),
    ),
    (("What did {A} plant?", "{A} planted a seed."),
     ("Where did {A} plant the seed?", "{A} planted the seed {place}.")),
    THE_END,
    weather=False,
)  # fmt: skip
RACE = Plot(
    (
        ("<one day>, there was a [big |]race {place}.", "<one day>, {A} and {B} wanted to have a race {place}."),
        ("{A} and {his} {role} {B} both wanted to win {a_obj}.", "The winner would get {a_obj}."),
        ('"I will win!" <said> {B}<way>. "[We will see|Let us have fun]," <said> {A}<way>.',
         "{A} had practiced [for days|every morning]."),
        ('"One, two, three, go!" and off they [ran|went].',
         "They [ran|started to run] [as fast as they could|very fast]."),
        ("{A} was [first|ahead], but then {B} [fell down|tripped over a stone|hurt {bhis} foot].",
         "[Suddenly|Then], {B} [fell down|tripped] {spot}."),
        ("{A} [stopped|turned around] and [ran back|went back]. \"Are you [hurt|all right]?\" {he} asked.",
         "{A} [could win now|was almost there], but {he} [stopped|turned around] to help {B}."),
        ("{he} [helped {B} up|took {B} by the hand], and they [finished|crossed the line] together.",
         "They [walked|ran] to the end [hand in hand|side by side|together]."),
        ("[They both got|They shared] the {obj}, and everyone cheered.",
         '"[You are a good friend|Thank you for helping me], {A}," <said> {B}<way>.',
         "{A} did not [win|come first], but {he} had [helped a friend|done the right thing]."),
    ),
    (("Who fell?", "{B} fell."), ("Who helped {B}?", "{A} helped {B}."),
     ("Where was the race?", "The race was {place}.")),
    OUT_TOGETHER,
)  # fmt: skip
COOKING = Plot(
    (
        ("<one day>, {A} wanted to [make|cook] {food} [for|with] {his} {kin}.",
         "<one day>, {his} {kin} and {A} were making {food}."),
        ("But there was no [salt|milk|water|sugar] [left|in the house].",
         '"Oh no," <said> {his} {kin}<way>. "We have no [salt|milk|sugar]."'),
        ('"[I will get some|I can go]," <said> {A}<way>, and {he} [took|picked up] {a_obj} and went {to}.',
         "So {A} [took|picked up] {a_obj} and [ran|walked|went] {to}."),
        ("On the way, {he} met {B}, {his} {role}, who [looked hungry|was looking for something to eat|was bored].",
         "There {he} met {his} {role} {B}, who [looked hungry|had nothing to do]."),
        ('"[Come and eat with us|Come with me]," <said> {A}<way>. "[We are making {food}|You can help us]."',
         "{A} [asked|invited] {B} to [come along|eat with them]."),
        ("Back at home, they [mixed|stirred] everything [in|together in] a big bowl.",
         "They [washed their hands and |]helped with the cooking[ until it was done|]."),
        ("The {food} [smelled|tasted] [wonderful|so good].",
         "Soon the {food} was ready, and it [smelled|tasted] [wonderful|so good]."),
        ("{A}, {B} and {his} {kin} [ate|shared] it all.",
         '"[This is the best {food} ever|We should do this every day]!" <said> {B}<way>.'),
    ),
    (("What did {A} want to make?", "{A} wanted to make {food}."), ("Who did {A} meet?", "{A} met {B}.")),
    AT_HOME_TOGETHER,
    weather=False,
)  # fmt: skip
TREASURE = Plot(
    (
        ("<one day>, {A} was [digging|playing|walking] {place}.",
         "<one day>, {A} [went|walked] {to} to [play|look for shells]."),
        ("{spot}, {he} [found|saw] an old [chest|sack].",
         "[Suddenly|There] {he} saw something {spot}. It was an old [chest|sack]."),
        ('"What [is|could be] inside?" {he} [wondered|asked].', "{he} opened it very [slowly|carefully].", ""),
        ("Inside [it there |there |]was {a_obj}.", "And inside was {a_obj}!",),
        ("{A} wanted to keep it, but {he} [thought|knew] that [somebody missed it|it belonged to somebody].",
         '"[Somebody|Someone] must miss this," {A} [said|thought].'),
        ("{he} asked {his} {kin}, and {ghe} said, \"It [could|may] belong to {B}.\"",
         "{he} [asked everyone|knocked on every door] in the village."),
        ('"That is my {thing}!" [cried|said] {B}. "I lost it [long ago|last year|{count} days ago]."',
         "It [was the {thing} of {B}|belonged to {B}], who had lost it [long ago|last year|{count} days ago]."),
        ("{A} gave it back, and {B} [thanked {him}|smiled|gave {him} {a_obj2}].",
         '"You are so [honest|kind]," {B} said and gave {A} {a_obj2}[ to say thank you|].'),
    ),
    (("What was inside?", "Inside was {a_obj}."), ("Whose {thing} was it?", "It was the {thing} of {B}.")),
    AT_HOME_TOGETHER,
)  # fmt: skip
BROKEN = Plot(
    (
        ("{his} {role} {B} had {a_obj} and [was very proud of it|loved it].", "<one day>, {B} showed {A} {a_obj}."),
        ("{A} [was allowed to hold it|played with it] {place}. But [it fell down|{he} dropped it], "
         "and [it broke|crack, it was broken].",
         "While {he} was playing {place}, {A} [dropped|fell on] the {thing}, and it broke."),
        ("{A} [was afraid|did not know what to do|wanted to hide it {spot}].",
         '"Oh no," {A} thought. "{B} will be so [sad|angry]."'),
        ("[But {he}|{he}] [wanted|decided] to tell the truth.",
         "{his} {kin} said, \"[It is best to tell the truth|Go and tell {bhim}].\""),
        ('"I am [so |very |]sorry, {B}," <said> {A}<way>. "I broke your {thing}."',
         "{A} went to {B} and [told {bhim} everything|said that {he} was sorry]."),
        ("{B} was sad[ at first|], but {bhe} was not angry.",
         '"Thank you for telling me," <said> {B}<way>. "[I am not angry|We can fix it]."'),
        ("[Together|With some glue], they fixed the {obj}[ {place}|].",
         "They worked [all day|together] and fixed the {thing}."),
        ("[Soon it|Now it] [was as good as new|looked even better than before].",
         "{A} was glad that {he} had told the truth."),
    ),
    (("What did {A} break?", "{A} broke the {obj}."), ("Whose {thing} was it?", "It was the {thing} of {B}.")),
    AT_HOME_TOGETHER,
    weather=False,
)  # fmt: skip
LEARNING = Plot(
    (
        ("{A} wanted to learn how to [whistle|ride a bike|dance|skate|juggle|jump rope].",
         "There was one thing {A} could not do: {he} could not [whistle|ride a bike|dance|skate|juggle|jump rope]."),
        ("<one day>, {he} went {to} and tried. [It was very hard|{he} fell down {count} times|It did not work].",
         "{he} tried [again and again|every day] {place}, but it [was too hard|did not work]."),
        ('"I [will never learn it|cannot do it]," {A} said [sadly|and sat down].',
         "{A} [wanted to give up|felt sad|was tired and angry]."),
        ("{his} {role} {B} [saw {him}|came by]. \"[Try once more|I can show you|It took me a long time too],\" "
         "{bhe} said.",
         '"[Do not give up|I can teach you]," said {B}, {his} {role}.'),
        ("{B} showed {him} [what to do|how to do it|a trick].",
         "{B} stayed with {him} and helped {him} [all day|every day]."),
        ("[Day after day|Slowly], {A} got [better|better and better].",
         "{A} tried again, and this time it [was not so hard|went better]."),
        ('[Then one day|At last|In the end], {he} could do it! "Look at me!" {he} [cried|said].',
         "And [suddenly|then] {he} could do it [all alone|without help]."),
        ("{B} [clapped|cheered|was so proud] and gave {him} {a_obj}.", "{A} [was so proud|laughed and hugged {B}]."),
    ),
    (("Who helped {A}?", "{B} helped {A}."), ("Where did {A} practice?", "{A} practiced {place}.")),
    OUT_TOGETHER,
    weather=False,
)  # fmt: skip
ASTRAY = Plot(
    (
        ("<one day>, {A} saw a [blue|white|yellow] butterfly {place} and followed it.",
         "<one day>, {A} [walked|went] {to} and followed a [blue|white|yellow] butterfly."),
        ("{he} [ran|walked] [on and on|for a long time], past {home}[ and over a bridge|].",
         "The butterfly flew [on and on|past {home}], and {A} ran after it."),
        ("[Suddenly|Then|Soon], {he} did not know where {he} was.", "When {he} looked around, {he} was lost."),
        ('"How do I get home?" {A} [asked|cried].', "{A} [sat down {spot}|was afraid] and began to cry.",),
        ("Then {a_bkind} came by. \"[Why are you sad|What is wrong]?\" the {bkind} asked. \"My name is {B}.\"",
         "{a_bkind} named {B} heard {him} and came [closer|to help]."),
        ('"I am lost," <said> {A}<way>. "[Can you help me?|I want to go home.]"', "{A} told {B} what had happened."),
        ('"I know the way," <said> {B}<way>. "[Follow me|Come with me]."',
         "{B} [took {him} by the hand|led the way] and they [walked|went] together."),
        ("[Soon|At last] {A} was home[ again|], and {his} {kin} [hugged {him}|was so glad].",
         "{A} saw {his} house[ at last|] and gave {B} {a_obj} to say thank you."),
    ),
    (("What did {A} follow?", "{A} followed a butterfly."), ("Who helped {A}?", "{B} helped {A}.")),
    AT_HOME_TOGETHER,
)  # fmt: skip
TIDYING = Plot(
    (
        ("<one day>, {A} and {B} [found|had] some paint and wanted to paint {a_obj}.",
         "<one day>, {A} and {his} {role} {B} painted {a_obj} {place}."),
        ("They painted and painted, and soon there was paint "
         "[everywhere|on their hands, on their clothes and on the floor].",
         "[But|Oh no,] the paint [fell over|ran everywhere], and everything was [a mess|full of paint]."),
        ('"What a mess!" <said> {his} {kin}<way>.', "{his} {kin} came and saw the mess.",
         '"[What have we done?|Oh no!]" <said> {B}<way>.'),
        ('"We are sorry," <said> {A}<way>. "We will clean it up."',
         "{A} and {B} [looked at each other|said that they were sorry]."),
        ("{A} [brought|got] water, and {B} [brought|got] {a_obj2}.",
         "They took water and soap and began to [clean|wash everything]."),
        ("They [worked|cleaned] [for a long time|all afternoon] until [everything was clean|the mess was gone].",
         "It was hard work, but they sang [a song|songs] and soon [everything was clean|the mess was gone]."),
        ("{his} {kin} [smiled|was happy] and gave them some {food}.",
         '"Well done," <said> {his} {kin}<way>, and [they all laughed|gave them some {food}].'),
        ("And the {obj} [looked wonderful|was the prettiest of all].",
         "Now the {thing} [looked wonderful|was the prettiest of all]."),
    ),
    (("What did they paint?", "They painted {a_obj}."), ("Who painted with {A}?", "{B} painted with {A}.")),
    AT_HOME_TOGETHER,
)  # fmt: skip
PICNIC = Plot(
    (
        ("<one day>, {A} and {his} {kin} packed {a_obj} and some {food} and went {to}.",
         "<one day>, {A} went {to} with {his} {kin}. They had {a_obj} and some {food}."),
        ("They sat down {spot} and began to eat.", "They found a good place {spot} and sat down."),
        ("But {a_pet} came and looked at the {food}.", "[Suddenly|Then], {a_pet} came [closer and closer|to them]."),
        ('"[Is it hungry|Can I give it some]?" {A} asked. "[I think so|Yes, of course]," <said> {his} {kin}<way>.',
         '"[Look|Oh, look]!" whispered {A}. "[It is hungry|It wants some {food}]."'),
        ("{A} gave the {pet} [a little bit|some] of the {food}.",
         "{A} put some {food} on the ground, and the {pet} ate it."),
        ("The {pet} ate [it all|everything] and [sat down next to {A}|looked very happy].",
         "It was not [afraid|shy] [any more|at all] and stayed with them."),
        ("They played {place} [until the evening|all afternoon].", "{A} counted {count} {many} on the way home.", ""),
    ),
    (("What did {A} give to the {pet}?", "{A} gave some {food} to the {pet}."), ("Where did {A} go?", "{A} went {to}."),
     ("Who went with {A}?", "The {kin} went with {A}.")),
    OUT_ALONE,
)  # fmt: skip

PLOTS = (
    LOST, SHARING, RESCUE, GIFT, STORM, NIGHT, NEW_FRIEND, SEED, RACE, COOKING, TREASURE, BROKEN, LEARNING, ASTRAY,
    TIDYING, PICNIC,
)  # fmt: skip
