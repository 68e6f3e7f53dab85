"""Questions in English to SQL: fine-tunes a T5 and judges its queries by the records that they return."""
