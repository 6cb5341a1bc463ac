"""Parts of speech recognition and synthesis: recordings, transcripts, vocabularies, speakers."""
