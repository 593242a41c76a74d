"""The words of the simulator's vocabulary, most frequent first. Data only."""

from __future__ import annotations

WORDS: tuple[str, ...] = tuple(
    """
    the of and a to in is it that was for on are with as at be this have from or one had by not
    but what all were when we there can an your which their said if do will each about how up
    out them then she many some so these would other into has more her two like him see time
    could no make than first been its who now people my made over did down only way find use may
    water long little very after words called just where most know get through back much go good
    new write our me man too any day same right look think also around another came come work
    three word must because does part even place well such here take why help put different away
    again off went old number great tell men say small every found still between name should
    home big give air line set own under read last never us left end along while might next
    sound below saw something thought both few those always show large often together asked
    house world going want school important until form food keep children feet land side without
    boy once animal life enough took four head above kind began almost live page got earth need
    far hand high year mother light country father let night picture being study second soon
    story since white ever paper hard near sentence better best across during today however sure
    knew try told young sun thing whole hear example heard several change answer room sea
    against top turned learn point city play toward five himself usually money seen car morning
    given order red door cut ship short quiet river garden letter window winter summer autumn
    spring mountain forest stone bridge road village town harbour boat sail wind rain snow cloud
    storm thunder lightning shadow dream voice silence music song dance bell clock hour minute
    week month season century king queen castle tower gate wall field farm horse cow sheep goat
    dog cat bird fish fox wolf bear deer rabbit mouse lion tiger owl eagle crow swan duck tree
    leaf root branch flower seed grass apple pear plum cherry bread cheese butter milk honey
    sugar salt pepper soup meat egg rice corn tea coffee cup plate spoon knife fork table chair
    bed lamp candle fire smoke ash coal iron gold silver copper glass wood cloth wool silk
    cotton rope wheel cart train engine machine tool hammer nail axe key lock box bag basket
    bottle book map pen ink desk shelf library teacher student doctor nurse sailor soldier
    farmer baker miller smith weaver hunter miner painter writer poet singer player driver
    captain judge lawyer merchant neighbour stranger friend brother sister daughter son cousin
    uncle aunt grandmother grandfather baby child woman girl crowd family guest host servant
    master owner partner leader team group class nation government law rule rights peace war
    battle victory treaty border north south east west island coast beach shore cliff cave
    valley hill plain desert lake pond stream ocean wave tide depth surface edge corner middle
    centre circle square triangle curve angle length width height weight size shape colour blue
    green yellow black brown grey orange purple pink bright dark warm cold hot cool dry wet soft
    rough smooth sharp flat round straight narrow wide deep shallow thick thin heavy empty full
    open closed clean dirty fresh sweet bitter sour loud calm gentle strong weak quick slow
    early late rich poor proud humble brave afraid happy sad angry tired hungry thirsty cruel
    honest clever simple easy difficult strange common rare ancient modern famous secret hidden
    lost broken single double equal free ready certain possible true false likely able useful
    perfect special general local foreign public private ask begin believe belong blow borrow
    break bring build burn buy call carry catch choose climb close collect consider contain
    continue cook count cover cross cry decide describe dig discover divide draw drink drive
    drop eat enter escape expect explain fall feel fight fill fly fold follow forget gather grow
    guess guide hang happen hide hold hope hurry imagine improve include invent join jump kick
    laugh lay lead leave lend lie lift listen love mark meet melt mend mix move notice offer
    paint pass pay plant pour prepare press promise protect prove pull push raise reach receive
    remember repair repeat reply rest return ride ring rise roll run save search sell send
    separate serve settle shake share shine shout shut sing sit sleep smell smile speak spend
    spread stand start stay steal stop strike swim swing talk taste teach tear thank throw touch
    trade travel trust turn understand visit wait wake walk wander warn wash watch wear weave
    whisper win wish wonder yield according actually ago ahead already although among anyone
    anything apart beside beyond briefly carefully clearly deeply despite directly easily either
    else especially everyone everything everywhere exactly except finally forward gently
    gradually half hardly immediately indeed inside instead largely later less maybe mostly
    nearly neither nobody nothing nowhere onto outside perhaps probably quickly quietly rather
    really recently sharply slightly slowly somebody somehow sometimes somewhere suddenly
    therefore though throughout thus tomorrow truly twice unless upon usual whatever whenever
    wherever whether whose within yesterday yet ability account action activity advice age
    agreement amount area argument art attempt attention balance base basis beauty beginning
    behaviour belief benefit blood body bone brain breath building business care case cause
    chance character choice claim code comfort comment company comparison condition connection
    control conversation copy cost course crime cycle damage danger data date death debt
    decision degree demand design detail development difference direction discovery discussion
    disease distance distribution doubt duty education effect effort energy environment error
    event evidence exchange existence experience experiment expert expression eye face fact
    failure fear feature feeling figure finger flame flight floor flow focus force fortune
    foundation frame freedom front fruit function future game gift goal grain ground growth
    habit hair harm health heart heat history hole honour hunger idea image impulse income
    increase industry information instrument interest invention issue journey joy judgement
    knowledge labour lack language layer level limit list logic loss luck lunch manner market
    mass material matter meal meaning measure memory message metal method mind mistake model
    moment mood motion mouth movement muscle nature neck news noise note object observation
    opinion opportunity organ origin pain pair past path pattern pause payment period person
    piece pleasure pocket poem poison policy position power practice pressure price print prison
    problem process produce product profit program progress project property proof protest
    purpose quality quantity question range rate ray reaction reader reason record regret
    relation religion request respect result reward rhythm risk role roof safety sample scale
    scene science score screw secretary selection self sense series service shame sheet shelter
    shock shop sign signal skill skin sky slope society soil solution sort source space speed
    spirit spot stage stamp star state statement station steam steel stem step stick stomach
    store strength structure style substance success suggestion support surprise system tail
    task theory thread throat throne thumb ticket title toe tongue tooth topic track tradition
    transport treasure trial trick trouble truth type unit universe value variety version view
    virtue vision volume vote wage waste weather wedding weapon welcome wing winner wire wisdom
    worker worth wound wrist zero token prompt query ledger schedule scheduler gateway catalog
    offering credit usage tenant organization server client network computer software hardware
    cache batch queue latency throughput cluster
    """.split()  # noqa: SIM905 - a list of a thousand quoted words reads worse
)

SUFFIXES: tuple[str, ...] = ("s", "ed", "ing", "ly", "er", "est", "ness", "tion")
