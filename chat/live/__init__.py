"""The core: the turns that run now, and the readers of this worker. The way of one token, with Redis and two workers:

On the worker that owns the turn
    a callback of the     Tap.set_result (the vendor's bytes, as aiohttp parses them), Reading.feed, Splitter.feed
    event loop            (bytes to events), OpenAIChat.read (JSON to text), Cleaner.feed, streams.ask, Voice.say
    a callback            Gather._run, Voice._leave, Voice._send (UTF-8 for APPEND, JSON for PUBLISH), RedisBus.ask,
                          RedisBus._flush, Wire.write

On every other worker that has a reader of the session
    a callback            Wire.data_received, RedisBus._read, RedisBus._hear
    broadcaster's task    RedisBus.next_published
    the room's task       Relay._listen, Room.hear, Room._words, Answer.learn_words, Room.notify, Answer.owed,
                          session.socket_frames (JSON and frame, once for all readers in step), DirectProtocol.write

The owner's own readers are told when Redis answers, without a task: Wire.data_received, Voice._answered, Voice._show,
Answer.learn_words, Room.notify and so on. Without Redis, Voice._leave calls Voice._show at once. A reader that does not
keep up, or whose server offers no `Direct`, is woken by Room.notify and writes in its own task: Follower.next.
"""
