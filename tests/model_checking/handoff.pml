/*
 * The KV hand-off as a model for spin: who may write and read which block, when everything that can go wrong does.
 *
 *   router --- asks, cancels ---> decode worker (blocks) ---- Run, Release ----> prefill worker (source blocks)
 *          <- answer, failure --                         <-- OPEN, data, CLOSE --
 *                                                        <------- seal ----------
 *
 * What is in it
 *   1 prefill worker, 2 decode workers, 2 requests, 3 blocks: decode worker 0 owns blocks 0 and 1, decode worker 1 block 2. There
 *   are 2 source blocks. Request 0 needs two blocks, which is all of decode worker 0 and all sources; request 1 needs one, on
 *   either worker. So blocks and sources are fought for. Up to 3 attempts: attempt t is the first of request t; attempt 2 is a
 *   retry of whichever request fails first. Each has a nonce of its own, here its number. One of the decode workers fences its
 *   writers (tcp, shm, nixl), the other cannot (cuda_ipc). The decode side goes through the states of kvtransfer/state.py.
 *
 * The network. A message that was sent may be taken at any time later, in any order with others, again, or never: delay,
 *   reordering, duplication and loss have no bound and need no state. It is forgotten only when no one could ever act on it.
 *   Data over a fenced link is such a message. Over the other kind a write is begun by the prefill worker and hits the pool
 *   at any time later, whatever happens in between; only the notice of it is a message. CLOSE is said after the last write was
 *   done. Such a link ends when its writer unmaps, between two writes, or dies.
 *   With FETCH, the worker that fences fetches (shm): the prefill worker says what is ready, then what its digest is; in between
 *   or later the decode worker reads the source, once, and the prefill worker knows at once that it is taken. A source that was
 *   given up holds anything, and can be read all the same, when its process is dead too.
 *
 * Time. Leases and deadlines are steps that are possible at any time, so nothing rests on speed, queues or clocks. A worker
 *   that is stopped for a while takes no step, as any may do at any time; with PREFILL_STOPS it may never go on.
 *
 * Faults, bounded by the macros below: crashes of either kind of worker, which comes back as a new incarnation; ends of links;
 *   damaged pieces. Not bounded: leaving clients, and workers that give up.
 *
 * What is abstracted. A piece is a whole block. A digest identifies bytes, place and nonce. A seal says what was sent. Credit and
 *   pulses only delay, and are left out. A prompt is computed in no time. Tickets are not forged. A link ends for one attempt at
 *   a time, so that all who use it may lose it, or some. A dead decode worker's memory is not that of the next one. A refused
 *   OPEN and an error as Run's reply are left out: each only hastens what a deadline does, which may be over at any time.
 *   RESERVED and DRAINED are left at once: nobody else sees them, and whoever waits for the blocks may come any time later.
 *
 * Properties
 *   NoReadAfterReassign   a request computes only with blocks that hold what was verified for it and that nobody has written to
 *                         since; what is sent comes from a source that belongs to the prompt, and so does what is fetched,
 *                         unless the prefill worker has given the transfer up
 *   NoWriteAfterFree      no write hits a block that is free or belongs to another attempt
 *   AtMostOneFinish       a request ends at most once
 *   EventuallyTerminal    every request ends
 *   EventuallyFreed       every block and every source becomes free
 *
 *   The last two hold for fair runs. Each step changes something for good (to take a message that has no effect is no step), so
 *   runs are finite, and weak fairness says that a run ends only where no step is possible. What then is the case is checked in
 *   each configuration, by the process AtTheEnd; that no run goes on for ever, by the claim `eventually` (with LIVENESS).
 *
 * Mutants, by -D, each of which some property must refute
 *   NO_EPOCH              data finds its place by the number of the block alone
 *   FREE_ON_ABORT         blocks of a failed or cancelled transfer are free at once, whatever its writer does
 *   EARLY_LEASE_END       a writer that was silent for the time of its lease counts as gone
 *   COUNT_ONLY            complete is a number of arrivals, not a set of blocks
 *   NO_DIGEST             what arrived is believed
 *   EARLY_SOURCE_END      sources of a failed transfer are free at once, whatever the write under way does
 *   FINISH_UNTAKEN        (with FETCH) sources of a finished transfer are free when all is said, whether they were fetched or not
 *   ANY_ANSWER            the router takes the answer of any attempt
 *   NO_DEADLINE           nobody gives up by himself
 *   DEAF_TO_LINK_END      the end of a link does not end its writers
 *
 * Witnesses, by -D: BOTH_ANSWERED, RETRY_ANSWERED, LATE_WRITE, STALE_FETCH (with FETCH), ANSWERED_AFTER_CRASHES turn "this can
 * happen" into an error, whose trail is a run in which it does. In a trail the decode side prints what happens to it, an event
 * a line: event, attempt, details.
 */

#ifndef FENCED0
#define FENCED0 false /* decode worker 0 can shut a writer out by itself, or not */
#endif
#ifndef FENCED1
#define FENCED1 true
#endif
#ifndef MAX_PREFILL_CRASHES
#define MAX_PREFILL_CRASHES 1
#endif
#ifndef MAX_DECODE_CRASHES
#define MAX_DECODE_CRASHES 1
#endif
#ifndef MAX_BREAKS
#define MAX_BREAKS 1
#endif
#ifndef MAX_FLIPS
#define MAX_FLIPS 1
#endif
#ifndef ATTEMPTS
#define ATTEMPTS 3
#endif

#define NOBODY 255

/* The decode side of an attempt: as in state.py, but for the first two and the last, LOST with its worker. */
#define UNUSED 0
#define ASKED 1
#define RESERVED 2
#define OFFERED 3
#define STREAMING 4
#define SEALED 5
#define VERIFIED 6
#define ACTIVE 7
#define POISONED 8
#define CANCELLED 9
#define DRAINED 10
#define FREE 11
#define LOST 12

/* The prefill side of an attempt. */
#define UNSEEN 0
#define ENTERING 1 /* sources are pinned, the link is asked for admission */
#define WRITING 2
#define STOPPING 3 /* nothing new is written; a write may be under way */
#define SPENT 4    /* over, or released before it came */

/* A request, at the router. */
#define WAITING 0
#define RUNNING 1
#define ANSWERED 2
#define FAILED 3

#define RECEIVING(t) (state[t] == STREAMING || state[t] == SEALED)
#define UNDECIDED(t) (state[t] >= OFFERED && state[t] <= SEALED)
#define CANCELLABLE(t) (state[t] >= OFFERED && state[t] <= ACTIVE)
#define FENCED(t) (worker[t] == 0 && FENCED0 || worker[t] == 1 && FENCED1)
#define SIZE(t) (2 - request[t])
#define BIT(k) (1 << (k))
#define ALL(t) ((1 << SIZE(t)) - 1)
#define PLACE(t, k) (place[t] + (k))
#define CONTENT(t, k) (1 + 2 * (t) + (k))
#define DAMAGED 99

/* -- the world -- */
byte state[ATTEMPTS];
byte request[ATTEMPTS];
byte worker[ATTEMPTS];
byte place[ATTEMPTS];    /* the first block of the ticket */
bool writer[ATTEMPTS];   /* decode side: a writer was let in, and is not known to have stopped */
byte verified[ATTEMPTS]; /* decode side: the set of blocks */
#ifdef COUNT_ONLY
byte arrivals[ATTEMPTS];
#endif

byte prefill[ATTEMPTS];
byte sent[ATTEMPTS];    /* blocks written, in order */
bool busy[ATTEMPTS];    /* a write was begun and is not done */
byte source[ATTEMPTS];  /* the first source block */
#ifdef FETCH
byte ready[ATTEMPTS];    /* the set of blocks that are said to be ready, and that nobody has taken */
bool given_up[ATTEMPTS]; /* by the prefill side: its sources are not kept for whoever fetches */
#endif
bool unlinked[ATTEMPTS]; /* the prefill end of this attempt's link is gone, or the decode worker's process is */
bool outdated[ATTEMPTS]; /* the ticket names an earlier incarnation of the prefill worker */

byte owner[3] = NOBODY; /* of blocks: an attempt */
byte content[3];
byte source_owner[2] = NOBODY;

byte phase[2];  /* of requests */
byte current[2] = NOBODY;
byte ends[2];

/* -- the network -- */
bool run_sent[ATTEMPTS], release_sent[ATTEMPTS], cancel_sent[ATTEMPTS], open_sent[ATTEMPTS], close_sent[ATTEMPTS];
bool grant_sent[ATTEMPTS], seal_sent[ATTEMPTS];
byte news[ATTEMPTS]; /* to the router: 0, or ANSWERED or FAILED */
byte data_sent[ATTEMPTS * 2]; /* 0, the content over a fenced link, or a notice, which states a digest */

byte prefill_crashes, decode_crashes, breaks, flips;
bool stopped;

/* -- decode side -- */

inline forget_messages(t) {
    /* Nothing of these could ever be acted upon again. With NO_EPOCH data could. */
    seal_sent[t] = false;
    close_sent[t] = false;
    cancel_sent[t] = false;
    verified[t] = 0;
#ifdef COUNT_ONLY
    arrivals[t] = 0;
#endif
#ifdef FETCH
    ready[t] = 0; /* it is taken by nobody: dropped */
#endif
#ifndef NO_EPOCH
    data_sent[2 * t] = 0;
    data_sent[2 * t + 1] = 0;
#endif
}

/* RESERVED, and OFFERED at once: nobody else knows of it in between */
inline offer(t) {
    printf("offer %d %d %d %d\n", t, worker[t], place[t], SIZE(t));
    state[t] = OFFERED;
    run_sent[t] = true
}

/* The news is of interest only while the router waits for this attempt. */
inline tell_router(t, what) {
    if
#ifdef ANY_ANSWER
    :: true ->
#else
    :: current[request[t]] == t ->
#endif
        news[t] = what
    :: else
    fi
}

inline give_back(t) {
    for (k : 0 .. SIZE(t) - 1) {
        owner[PLACE(t, k)] = NOBODY;
        content[PLACE(t, k)] = 0;
    }
    k = 0;
}

inline drain_if_alone(t) {
    if
    :: (state[t] == POISONED || state[t] == CANCELLED) && !writer[t] -> drained(t)
    :: else
    fi
}

/* DRAINED, and FREE at once: whoever waits for the blocks may take them any time later anyway */
inline drained(t) {
    give_back(t);
    state[t] = FREE;
    forget_messages(t);
    retire(t)
}

/* When both ends are through, and no Run is on its way, it does not matter any more how it went. */
inline retire(t) {
    if
    :: (state[t] == FREE || state[t] == LOST) && (prefill[t] == SPENT || prefill[t] == UNSEEN && !run_sent[t]) ->
        state[t] = FREE;
        prefill[t] = SPENT;
        unlinked[t] = false;
        outdated[t] = false;
        open_sent[t] = false;
        source[t] = 0;
#ifdef FETCH
        given_up[t] = false;
#endif
#ifndef NO_EPOCH
        place[t] = 0;
        worker[t] = 0;
#endif
    :: else
    fi
}

inline end_early(t, ending) {
    open_sent[t] = false;
    state[t] = ending;
    if
    :: prefill[t] != SPENT -> release_sent[t] = true
    :: else
    fi;
    if
    :: FENCED(t) -> writer[t] = false
    :: else
    fi;
#ifdef FREE_ON_ABORT
    drained(t);
#endif
    drain_if_alone(t)
}

inline poison(t) {
    tell_router(t, FAILED);
    end_early(t, POISONED)
}

#ifdef COUNT_ONLY
#define COMPLETE(t) (arrivals[t] >= SIZE(t))
#else
#define COMPLETE(t) (verified[t] == ALL(t))
#endif

inline verify_if_complete(t) {
    if
    :: state[t] == SEALED && COMPLETE(t) && !writer[t] -> state[t] = VERIFIED
    :: else
    fi
}

inline writer_gone(t) {
    writer[t] = false;
    close_sent[t] = false;
    if
    :: RECEIVING(t) && !COMPLETE(t) -> poison(t)
    :: else -> verify_if_complete(t); drain_if_alone(t)
    fi
}

inline hit(t, k, what) {
    assert(owner[PLACE(t, k)] == t); /* NoWriteAfterFree */
    assert(state[t] != VERIFIED && state[t] != ACTIVE); /* NoReadAfterReassign: nobody writes after verification */
    content[PLACE(t, k)] = what
}

inline arrived(t, k) {
    if
#ifdef NO_DIGEST
    :: true ->
#else
    :: content[PLACE(t, k)] == CONTENT(t, k) ->
#endif
        verified[t] = verified[t] | BIT(k);
#ifdef COUNT_ONLY
        arrivals[t]++;
#endif
        verify_if_complete(t)
    :: else -> poison(t)
    fi
}

#ifdef COUNT_ONLY
#define NEWS(t, k) (arrivals[t] < SIZE(t))
#else
#define NEWS(t, k) (!(verified[t] & BIT(k)))
#endif

inline check_before_use(t) {
    for (k : 0 .. SIZE(t) - 1) {
        assert(owner[PLACE(t, k)] == t); /* NoReadAfterReassign */
        assert(content[PLACE(t, k)] == CONTENT(t, k))
    }
    k = 0
}

#ifdef FETCH
#define FETCHES(t) FENCED(t)
#define IS_READY(t, k) ((ready[t] & BIT(k)) && RECEIVING(t) && writer[t])
#define TAKEN(t, k) (!(ready[t] & BIT(k)))
#define SOURCE(t, k) source_owner[source[t] + (k)]
#define MAY_DIFFER(t, k) (SOURCE(t, k) != t || flips < MAX_FLIPS)

inline fetch(t, k, what) {
    printf("fetch %d %d %d\n", t, k, what == DAMAGED);
    assert(SOURCE(t, k) == t || given_up[t]); /* NoReadAfterReassign, of sources */
    hit(t, k, what);
    ready[t] = ready[t] & ~BIT(k)
}

inline count_flip(t, k) {
    if
    :: SOURCE(t, k) == t -> flips++
    :: else
    fi
}
#else
#define FETCHES(t) false
#define TAKEN(t, k) false
#endif

proctype Decode(byte t) {
    byte k;
end:
    do
    /* a request is admitted when there is room */
    :: d_step { state[t] == ASKED && request[t] == 0 && owner[0] == NOBODY && owner[1] == NOBODY ->
        place[t] = 0; owner[0] = t; owner[1] = t; offer(t) }
    :: d_step { state[t] == ASKED && request[t] == 1 && worker[t] == 0 && owner[0] == NOBODY ->
        place[t] = 0; owner[0] = t; offer(t) }
    :: d_step { state[t] == ASKED && request[t] == 1 && worker[t] == 0 && owner[1] == NOBODY ->
        place[t] = 1; owner[1] = t; offer(t) }
    :: d_step { state[t] == ASKED && request[t] == 1 && worker[t] == 1 && owner[2] == NOBODY ->
        place[t] = 2; owner[2] = t; offer(t) }

    /* OPEN: a nonce admits one writer, once */
    :: d_step { open_sent[t] && state[t] == OFFERED ->
        printf("open %d\n", t); open_sent[t] = false; state[t] = STREAMING; writer[t] = true;
        if
        :: prefill[t] == ENTERING -> grant_sent[t] = true
        :: else
        fi }

    /* data; where the writer does not send it, it is there already, and this is the notice */
#ifdef FETCH
    :: d_step { IS_READY(t, 0) -> fetch(t, 0, CONTENT(t, 0)) }
    :: d_step { IS_READY(t, 1) -> fetch(t, 1, CONTENT(t, 1)) }
    :: d_step { IS_READY(t, 0) && MAY_DIFFER(t, 0) -> count_flip(t, 0); fetch(t, 0, DAMAGED) }
    :: d_step { IS_READY(t, 1) && MAY_DIFFER(t, 1) -> count_flip(t, 1); fetch(t, 1, DAMAGED) }
#else
#ifdef NO_EPOCH
    :: d_step { data_sent[2 * t] && FENCED(t) && owner[PLACE(t, 0)] != NOBODY &&
                RECEIVING(owner[PLACE(t, 0)]) && writer[owner[PLACE(t, 0)]] && NEWS(t, 0) ->
        printf("data %d 0 %d\n", t, data_sent[2 * t] == DAMAGED); hit(t, 0, data_sent[2 * t]); arrived(t, 0) }
    :: d_step { data_sent[2 * t + 1] && FENCED(t) && owner[PLACE(t, 1)] != NOBODY &&
                RECEIVING(owner[PLACE(t, 1)]) && writer[owner[PLACE(t, 1)]] && NEWS(t, 1) ->
        printf("data %d 1 %d\n", t, data_sent[2 * t + 1] == DAMAGED); hit(t, 1, data_sent[2 * t + 1]); arrived(t, 1) }
#else
    :: d_step { data_sent[2 * t] && FENCED(t) && RECEIVING(t) && writer[t] && NEWS(t, 0) ->
        printf("data %d 0 %d\n", t, data_sent[2 * t] == DAMAGED); hit(t, 0, data_sent[2 * t]); arrived(t, 0) }
    :: d_step { data_sent[2 * t + 1] && FENCED(t) && RECEIVING(t) && writer[t] && NEWS(t, 1) ->
        printf("data %d 1 %d\n", t, data_sent[2 * t + 1] == DAMAGED); hit(t, 1, data_sent[2 * t + 1]); arrived(t, 1) }
#endif
#endif
    :: d_step { data_sent[2 * t] && (!FENCED(t) || TAKEN(t, 0)) && RECEIVING(t) && writer[t] && NEWS(t, 0) ->
        printf("notice %d 0\n", t); arrived(t, 0) }
    :: d_step { data_sent[2 * t + 1] && (!FENCED(t) || TAKEN(t, 1)) && RECEIVING(t) && writer[t] && NEWS(t, 1) ->
        printf("notice %d 1\n", t); arrived(t, 1) }

    :: d_step { close_sent[t] && writer[t] -> printf("close %d\n", t); writer_gone(t) }
#ifndef DEAF_TO_LINK_END
    :: d_step { unlinked[t] && writer[t] -> printf("link_end %d\n", t); writer_gone(t) }
#endif

    /* Run's reply */
    :: d_step { seal_sent[t] && state[t] == STREAMING ->
        printf("seal %d\n", t); seal_sent[t] = false; state[t] = SEALED; verify_if_complete(t) }
    :: d_step { seal_sent[t] && state[t] == OFFERED -> printf("seal %d\n", t); seal_sent[t] = false; poison(t) }

    /* time is over: the ticket's, or the lease of the writer */
#ifndef NO_DEADLINE
    :: d_step { UNDECIDED(t) -> printf("deadline %d\n", t);
#ifdef EARLY_LEASE_END
        writer[t] = false;
#endif
        poison(t) }
#endif

    :: d_step { cancel_sent[t] && CANCELLABLE(t) ->
        printf("cancel %d\n", t); cancel_sent[t] = false; end_early(t, CANCELLED) }
    :: d_step { cancel_sent[t] && state[t] == ASKED -> cancel_sent[t] = false; state[t] = FREE; retire(t) }

    /* use */
    :: d_step { state[t] == VERIFIED -> printf("use %d\n", t); check_before_use(t); state[t] = ACTIVE }
    :: d_step { state[t] == ACTIVE -> printf("answer %d\n", t); check_before_use(t); tell_router(t, ANSWERED); drained(t) }
    od
}

/* -- prefill side -- */

inline unpin(t) {
    for (k : 0 .. SIZE(t) - 1) {
        if
        :: source_owner[source[t] + k] == t -> source_owner[source[t] + k] = NOBODY
        :: else
        fi
    }
    k = 0
}

inline over(t) {
    prefill[t] = SPENT;
    unpin(t);
    sent[t] = 0;
    run_sent[t] = false;
    release_sent[t] = false;
    grant_sent[t] = false;
    retire(t)
}

inline stop_writing(t) {
    prefill[t] = STOPPING;
#ifdef FETCH
    given_up[t] = true;
#endif
    grant_sent[t] = false;
    release_sent[t] = false;
#ifdef EARLY_SOURCE_END
    unpin(t);
#endif
    stopped_if_idle(t)
}

inline stopped_if_idle(t) {
    if
    :: prefill[t] == STOPPING && !busy[t] -> say_close(t); over(t)
    :: else
    fi
}

inline write(t, k, what) {
    assert(source_owner[source[t] + k] == t); /* NoReadAfterReassign, of sources */
    if
    :: FENCED(t) ->
        /* the content, or what states its digest, is in the network, where it waits for whoever reads it */
        if
#ifdef NO_EPOCH
        :: true ->
#else
        :: UNDECIDED(t) ->
#endif
            data_sent[2 * t + k] = what
        :: else
        fi
    :: !FENCED(t) && state[t] != LOST ->
        printf("store %d %d %d\n", t, k, what == DAMAGED);
        hit(t, k, what);
        if
        :: UNDECIDED(t) -> data_sent[2 * t + k] = 1
        :: else
        fi
    :: else /* memory of a process that is no more */
    fi;
    busy[t] = false;
    sent[t]++;
    stopped_if_idle(t)
}

inline begin_write(t) {
    busy[t] = true;
#ifdef FETCH
    if
    :: FETCHES(t) && UNDECIDED(t) -> ready[t] = ready[t] | BIT(sent[t])
    :: else
    fi
#endif
}

inline say_close(t) {
    if
    :: !unlinked[t] && (writer[t] || state[t] == OFFERED) -> close_sent[t] = true
    :: else
    fi
}

#if defined(FETCH) && !defined(FINISH_UNTAKEN)
#define ALL_TAKEN(t) (ready[t] == 0)
#else
#define ALL_TAKEN(t) true
#endif

#define OPEN_AT_PREFILL(t) (prefill[t] == ENTERING || prefill[t] == WRITING)

proctype Prefill(byte t) {
    byte k;
end:
    do
    :: d_step { !stopped && run_sent[t] && prefill[t] == UNSEEN && !outdated[t] && request[t] == 0 &&
                source_owner[0] == NOBODY && source_owner[1] == NOBODY ->
        source[t] = 0; source_owner[0] = t; source_owner[1] = t;
        run_sent[t] = false; prefill[t] = ENTERING; open_sent[t] = (state[t] == OFFERED) }
    :: d_step { !stopped && run_sent[t] && prefill[t] == UNSEEN && !outdated[t] && request[t] == 1 &&
                (source_owner[0] == NOBODY || source_owner[1] == NOBODY) ->
        if
        :: source_owner[0] == NOBODY -> source[t] = 0
        :: else -> source[t] = 1
        fi;
        source_owner[source[t]] = t;
        run_sent[t] = false; prefill[t] = ENTERING; open_sent[t] = (state[t] == OFFERED) }

    :: d_step { !stopped && prefill[t] == ENTERING && grant_sent[t] -> grant_sent[t] = false; prefill[t] = WRITING }

    :: d_step { !stopped && prefill[t] == WRITING && !busy[t] && !unlinked[t] && sent[t] < SIZE(t) -> begin_write(t) }
    :: d_step { !stopped && busy[t] && sent[t] == 0 -> write(t, 0, CONTENT(t, 0)) }
    :: d_step { !stopped && busy[t] && sent[t] == 1 -> write(t, 1, CONTENT(t, 1)) }
    :: d_step { !stopped && busy[t] && flips < MAX_FLIPS && !FETCHES(t) && sent[t] == 0 -> flips++; write(t, 0, DAMAGED) }
    :: d_step { !stopped && busy[t] && flips < MAX_FLIPS && !FETCHES(t) && sent[t] == 1 -> flips++; write(t, 1, DAMAGED) }

    :: d_step { !stopped && prefill[t] == WRITING && !busy[t] && sent[t] == SIZE(t) && ALL_TAKEN(t) ->
        say_close(t);
        if
        :: UNDECIDED(t) -> seal_sent[t] = true
        :: else
        fi;
        over(t) }

    /* failures: the lease or the ticket's time is over, the link is gone, the decode worker said Release */
#ifndef NO_DEADLINE
    :: d_step { !stopped && OPEN_AT_PREFILL(t) -> stop_writing(t) }
#endif
    :: d_step { !stopped && OPEN_AT_PREFILL(t) && unlinked[t] -> stop_writing(t) }
    :: d_step { !stopped && OPEN_AT_PREFILL(t) && release_sent[t] -> stop_writing(t) }
    :: d_step { !stopped && prefill[t] == UNSEEN && release_sent[t] -> over(t) }
    od
}

/* -- router -- */

inline forget_news(who) {
    if
    :: current[who] != NOBODY ->
#ifdef ANY_ANSWER
        if
        :: news[current[who]] == FAILED -> news[current[who]] = 0
        :: else
        fi
#else
        news[current[who]] = 0
#endif
    :: else
    fi
}

inline ask(who, attempt, where) {
    forget_news(who);
    current[who] = attempt;
    request[attempt] = who;
    worker[attempt] = where;
    state[attempt] = ASKED;
    phase[who] = RUNNING
}

inline request_ends(who, how) {
    ends[who]++;
    assert(ends[who] <= 1); /* AtMostOneFinish */
    phase[who] = how;
    forget_news(who);
    current[who] = NOBODY
}

#define RETRY_LEFT (ATTEMPTS > 2 && state[ATTEMPTS - 1] == UNUSED)
#define ATTEMPT_FAILED(r) (phase[r] == RUNNING && news[current[r]] == FAILED)

proctype Router(byte r) {
end:
    do
    :: d_step { phase[r] == WAITING -> ask(r, r, 0) }
    :: d_step { phase[r] == WAITING && r == 1 -> ask(r, r, 1) }
    :: d_step { ATTEMPT_FAILED(r) && RETRY_LEFT -> ask(r, ATTEMPTS - 1, 0) }
    :: d_step { ATTEMPT_FAILED(r) && RETRY_LEFT && r == 1 -> ask(r, ATTEMPTS - 1, 1) }
    :: d_step { ATTEMPT_FAILED(r) && !RETRY_LEFT -> request_ends(r, FAILED) }
    :: d_step { phase[r] == RUNNING && news[current[r]] == ANSWERED -> request_ends(r, ANSWERED) }
#ifdef ANY_ANSWER
    :: d_step { news[r] == ANSWERED -> news[r] = 0; request_ends(r, ANSWERED) }
    :: d_step { state[ATTEMPTS - 1] != UNUSED && request[ATTEMPTS - 1] == r && news[ATTEMPTS - 1] == ANSWERED ->
        news[ATTEMPTS - 1] = 0; request_ends(r, ANSWERED) }
#endif
    /* the client leaves, or its time is over */
#ifndef NO_DEADLINE
    :: d_step { phase[r] == RUNNING ->
        if
        :: CANCELLABLE(current[r]) || state[current[r]] == ASKED -> cancel_sent[current[r]] = true
        :: else
        fi;
        request_ends(r, FAILED) }
#endif
    od
}

/* -- faults -- */

#define LIVE_AT(t, w) (worker[t] == w && state[t] >= ASKED && state[t] <= DRAINED)

inline decode_crash(w) {
    printf("crash %d\n", w);
    decode_crashes++;
    for (t : 0 .. ATTEMPTS - 1) {
        if
        :: LIVE_AT(t, w) ->
            if
            :: state[t] >= OFFERED -> give_back(t)
            :: else
            fi;
            state[t] = LOST;
            writer[t] = false;
            unlinked[t] = true;
            tell_router(t, FAILED);
            forget_messages(t);
            retire(t)
        :: else
        fi
    }
    t = 0
}

inline prefill_crash() {
    prefill_crashes++;
    for (t : 0 .. ATTEMPTS - 1) {
        if
        :: OPEN_AT_PREFILL(t) || prefill[t] == STOPPING ->
            busy[t] = false;
            unlinked[t] = true;
#ifdef FETCH
            given_up[t] = true;
#endif
            over(t)
        :: prefill[t] == SPENT && writer[t] -> unlinked[t] = true
        :: else
        fi;
        if
        :: state[t] >= OFFERED && prefill[t] == UNSEEN -> outdated[t] = true; run_sent[t] = false; retire(t)
        :: else
        fi
    }
    t = 0
}

proctype Faults() {
    byte t, k;
end:
    do
    :: d_step { decode_crashes < MAX_DECODE_CRASHES &&
                (LIVE_AT(0, 0) || LIVE_AT(1, 0) || LIVE_AT(ATTEMPTS - 1, 0)) -> decode_crash(0) }
    :: d_step { decode_crashes < MAX_DECODE_CRASHES &&
                (LIVE_AT(0, 1) || LIVE_AT(1, 1) || LIVE_AT(ATTEMPTS - 1, 1)) -> decode_crash(1) }
    :: d_step { prefill_crashes < MAX_PREFILL_CRASHES && !stopped -> prefill_crash() }
    :: d_step { breaks < MAX_BREAKS &&
                OPEN_AT_PREFILL(0) && !unlinked[0] && (FENCED(0) || !busy[0]) ->
        breaks++; unlinked[0] = true }
    :: d_step { breaks < MAX_BREAKS &&
                OPEN_AT_PREFILL(1) && !unlinked[1] && (FENCED(1) || !busy[1]) ->
        breaks++; unlinked[1] = true }
    :: d_step { breaks < MAX_BREAKS && ATTEMPTS > 2 &&
                OPEN_AT_PREFILL(ATTEMPTS - 1) && !unlinked[ATTEMPTS - 1] && (FENCED(ATTEMPTS - 1) || !busy[ATTEMPTS - 1]) ->
        breaks++; unlinked[ATTEMPTS - 1] = true }
#ifdef PREFILL_STOPS
    :: d_step { !stopped && (OPEN_AT_PREFILL(0) || OPEN_AT_PREFILL(1)) -> stopped = true }
#endif
    od
}

#define ALL_ENDED (phase[0] >= ANSWERED && phase[1] >= ANSWERED)
#define ALL_FREE (owner[0] == NOBODY && owner[1] == NOBODY && owner[2] == NOBODY)
#define ALL_UNPINNED (source_owner[0] == NOBODY && source_owner[1] == NOBODY)
#define IN_QUARANTINE(b) (owner[b] != NOBODY && !FENCED(owner[b]) && writer[owner[b]] && \
                          (state[owner[b]] == POISONED || state[owner[b]] == CANCELLED))
#define FREE_OR_QUARANTINED(b) (owner[b] == NOBODY || IN_QUARANTINE(b))

proctype AtTheEnd() {
    timeout ->
        assert(ALL_ENDED); /* EventuallyTerminal */
#ifdef PREFILL_STOPS
        /* it never goes on: then what it may still write to stays in quarantine, and only that */
        if
        :: stopped -> assert(FREE_OR_QUARANTINED(0) && FREE_OR_QUARANTINED(1) && FREE_OR_QUARANTINED(2))
        :: else -> assert(ALL_FREE && ALL_UNPINNED)
        fi
#else
        assert(ALL_FREE && ALL_UNPINNED) /* EventuallyFreed */
#endif
}

#ifdef BOTH_ANSWERED
#define WITNESS (phase[0] == ANSWERED && phase[1] == ANSWERED)
#endif
#ifdef RETRY_ANSWERED
#define WITNESS (request[ATTEMPTS - 1] == 0 && news[ATTEMPTS - 1] == ANSWERED)
#endif
#ifdef LATE_WRITE
#define WITNESS (IN_QUARANTINE(0) && busy[owner[0]] && content[0] == 0)
#endif
#ifdef STALE_FETCH
#define WITNESS (IS_READY(0, 0) && SOURCE(0, 0) == 1)
#endif
#ifdef ANSWERED_AFTER_CRASHES
#define WITNESS (prefill_crashes > 0 && decode_crashes > 0 && phase[0] == ANSWERED && phase[1] == ANSWERED)
#endif
#ifdef WITNESS
proctype Witness() {
end:
    d_step { WITNESS -> assert(false) }
}
#endif

init {
    atomic {
        byte i;
        for (i : 0 .. ATTEMPTS - 1) {
            run Prefill(i);
            run Decode(i)
        }
        run Router(0);
        run Router(1);
        run Faults();
#ifdef LIVENESS
        skip
#else
#ifdef WITNESS
        run Witness()
#else
        run AtTheEnd()
#endif
#endif
    }
}

#ifdef LIVENESS
ltl eventually { <> [] (ALL_ENDED && ALL_FREE && ALL_UNPINNED) }
#endif
