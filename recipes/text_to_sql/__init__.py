"""Questions in English to SQL: fine-tunes a T5 and scores its queries by the records that they return."""
